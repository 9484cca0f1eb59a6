"""What was removed?"""
