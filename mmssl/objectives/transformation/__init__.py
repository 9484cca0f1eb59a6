"""Which transformation was applied?"""
