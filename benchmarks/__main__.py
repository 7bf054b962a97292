"""`python -m pygen.benchmarks`: the same command as `pygen bench`."""

import sys

try:
    import typer

    from pygen.benchmarks.command import bench
except ImportError as error:
    print(f"pygen.benchmarks needs the cli extra ({error}): pip install 'pygen[cli]'", file=sys.stderr)
    sys.exit(2)

typer.run(bench)
