"""Moments over several devices and processes."""
