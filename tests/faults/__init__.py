"""Faults that the tests have to see: lists of them, a runner, and a tool that draws more of them.

See README.md.
"""
