"""Engines whose state is arrays, stepped by compiled code: an optional accelerator of what the modules above this room
do in Python (see `servetwin.engine.compiled.fleet`)."""
