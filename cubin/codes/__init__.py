"""Codes: levels of scales and signs, what they cost, and their files."""
