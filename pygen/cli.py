"""The `pygen` command: starts the application in _commands.py and turns every failure into one sentence."""

import sys
from collections.abc import Sequence

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes; 130 is what a shell reports for Ctrl-C

_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)
_EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "cli",
    "accelerate": "train",
    "safetensors": "train",
    "sklearn": "train",
    "libsbml": "ssa",
    "scipy": "ssa",
    "xarray": "ssa",
    "h5netcdf": "ssa",
    "h5py": "ssa",
    "pandas": "ssa",
}


def _sentence(error: BaseException) -> str:
    """What to tell the user: the message, and how to get a missing package."""
    if hasattr(error, "format_message"):  # a wrong option or command; typer's own class or click's, by version
        return f"{error.format_message().strip().rstrip('.')}; see pygen --help, or --help after a command"
    missing = error.name.split(".")[0] if isinstance(error, ImportError) and error.name else ""
    if missing in _EXTRAS:
        return f"this needs {missing}: pip install 'pygen[{_EXTRAS[missing]}]'"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return text or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input or a failure, 130 after Ctrl-C.

    Args:
        arguments: the words after `pygen`; those of the process by default. `--debug` anywhere among them lets the
            traceback of a failure through.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in words
    try:
        from pygen._commands import app

        code = app([word for word in words if word != "--debug"], prog_name="pygen", standalone_mode=False)
    except KeyboardInterrupt:
        print("pygen: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug or not (isinstance(error, _EXPECTED) or hasattr(error, "format_message")):
            raise  # an error of another kind is a bug of pygen, and its traceback the report
        print(f"pygen: {_sentence(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
