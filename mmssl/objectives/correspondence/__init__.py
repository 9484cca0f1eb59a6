"""Do these two belong together?"""
