"""Bytes to tensors: images, sounds, videos and clips with both on one clock, and text to token ids.

Sounds and videos are decoded by PyAV, whose wheel carries FFmpeg, and pictures by Pillow: nothing else has to be
installed. What cannot be decoded raises `DataError` with the name of the file and the reason.
"""
