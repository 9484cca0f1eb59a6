"""What stays the same across views?"""
