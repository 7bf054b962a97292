"""What all tests share: the kernels that a test runs on, and where the optional real data is.

Three sessions cover all kernels. The plain one runs the reference and every CPU level that the machine has; with
TRITON_INTERPRET=1 the same tests run the Triton kernels on CPU tensors; where torch sees a GPU they run there as well.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from harness import available_backends, running_on, search_backends

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(params=available_backends())
def backend(request):
    """The name of the kernels in use; `backend_device` has where their tensors live."""
    return request.param


@pytest.fixture
def backend_device(backend):
    with running_on(backend) as device:
        yield device


@pytest.fixture(params=search_backends())
def search_backend(request):
    """As `backend`, with the levels that only the search of codebooks has kernels for."""
    return request.param


@pytest.fixture
def search_device(search_backend):
    with running_on(search_backend) as device:
        yield device


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, so that an output element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def two_threads():
    """Allow two threads even where the session began with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that is not part of the repository: PYGEN_TEST_DATA, or shared/data beside it."""
    folder = Path(os.environ.get("PYGEN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set PYGEN_TEST_DATA to its folder")
    return folder


@pytest.fixture
def run_here(capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""
    from pygen import cli

    def run(*words):
        try:
            cli.main([str(word) for word in words])
            code = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """Runs the Python blocks of a page of docs/ one after the other, as a reader would; returns how many there were."""

    def run(name: str) -> int:
        page = DOCS / name
        if not page.is_file():
            pytest.skip("docs are not there")
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        monkeypatch.chdir(tmp_path)
        names: dict = {"__name__": "page"}
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/{name}, block {number}", "exec"), names)
        return len(blocks)

    return run
