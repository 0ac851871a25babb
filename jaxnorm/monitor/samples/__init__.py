"""The numbers that come out of the program: samples, their recording and measures of shift.

This room imports `probe`, and never `diagnosis`.
"""
