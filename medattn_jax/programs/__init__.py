"""Compiled programs as a microscope: what a step costs a chip, present or not.

chips: data sheets and the compilers of chips that are not here; traffic: a program's text, and the
bytes that it moves; report: all that one compiled program tells; roofline: the time that follows.
"""
