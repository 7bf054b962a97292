"""Benchmarks: a registry of cases (cases/), one runner that checks and then times them, and what it prints.

Read registry.py for what a case is, cases/cumax.py for how to write one, runner.py for what is done with it.
"""
