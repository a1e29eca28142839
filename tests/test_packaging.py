import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = ("transformers", "triton", "matplotlib", "PIL", "fusion_bench", "sklearn", "scipy", "pandas")


def python(code, directory):
    """Runs code with another working directory, which is on the path as with python -c."""
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(params=["repository", "elsewhere"])
def directory(request, tmp_path):
    return ROOT if request.param == "repository" else tmp_path


def test_importing_asks_for_no_extra(directory):
    code = f"""
import sys, torch, safetensors.torch, importlib.util

class Refuse:
    asked = set()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            self.asked.add(name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import wemoe_fast, wemoe_fast.cli, wemoe_fast.kernels
assert not any(name.startswith("wemoe_fast.benchmarks") for name in sys.modules)
import wemoe_fast.benchmarks.throughput
assert not Refuse.asked, Refuse.asked
print(wemoe_fast.__file__, wemoe_fast.kernels.__file__, importlib.util.find_spec("kernels") is None)
"""
    package, kernels, free = python(code, directory).split()
    assert Path(package).parent.name == "wemoe_fast"
    assert "GPU kernels of wemoe_fast" in Path(kernels).read_text()
    assert free == str(directory != ROOT)


def test_transformers_works_beside_the_folder_of_kernels():
    """It tries to import a package of the Hub's that is called kernels, and finds ours in this directory."""
    pytest.importorskip("transformers")
    code = """
import wemoe_fast.kernels, transformers.integrations.hub_kernels
transformers.BertModel(transformers.BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1))
print(wemoe_fast.kernels.__name__)
"""
    assert python(code, ROOT) == "wemoe_fast.kernels"


def test_modules_of_the_package_are_imported_by_name_with_all_public_names():
    import wemoe_fast

    assert all(hasattr(wemoe_fast, name) for name in wemoe_fast.__all__)


def test_the_version_is_written_once_per_place_and_agrees():
    import wemoe_fast

    assert f'version = "{wemoe_fast.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_wheel_holds_the_package_and_no_tests(tmp_path):
    tools = {name: importlib.metadata.version(name) for name in ("pip", "setuptools") if importlib.util.find_spec(name)}
    if len(tools) < 2 or int(tools["setuptools"].split(".")[0]) < 68:
        pytest.skip("building without network needs pip and setuptools >= 68")
    source = tmp_path / "source"
    ignored = {"build", "dist", "demo-out", "results", "__pycache__"}

    def ignore(folder, names):
        return [
            name
            for name in names
            if name in ignored or name.endswith(".egg-info") or name == "__pycache__" or name.startswith(".")
        ]

    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{tools}: {done.stderr}"
    [wheel] = tmp_path.glob("wemoe_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    for name in ("__init__.py", "kernels/__init__.py", "py.typed", "demo/data-requirements.txt", "cli.py"):
        assert f"wemoe_fast/{name}" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "wemoe_fast").rglob("*.py")}
    modules |= {f"wemoe_fast/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    assert modules <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"wemoe_fast"}
    assert any(name.endswith("LICENSE") for name in names)
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert not any(
        name in line for line in required if "extra ==" not in line for name in ("transformers", "matplotlib")
    )
