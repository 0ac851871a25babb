"""Moments over several devices and processes.

A program for many processes calls `initialize` first; `launch` starts several on one machine.
"""

from jaxnorm.distributed.launch import launch
from jaxnorm.distributed.processes import ProcessError, initialize, launched

__all__ = ["ProcessError", "initialize", "launch", "launched"]
