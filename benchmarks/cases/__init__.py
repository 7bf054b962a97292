"""The benchmark cases, one file per op. A new file here is found by itself; cumax.py is the one to copy."""
