"""README and pages: their links, their imports, their examples, their reach."""

import importlib
import pathlib
import re
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]


# Until the two packages are there, what speaks of them cannot be tried.
needs_library = pytest.mark.skipif(
  not all(
    (ROOT / "sparsejax" / package / "__init__.py").exists()
    for package in ("select", "weights")
  ),
  reason="sparsejax.select and sparsejax.weights are not written yet",
)


def load_coverage_check():
  path = ROOT / "docs" / "extensions" / "coverage_check.py"
  spec = importlib.util.spec_from_file_location("coverage_check", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


coverage_check = load_coverage_check()


def table_rows():
  """The cells of README's table: what, import, page."""
  lines = re.findall(r"^\|(.*)\|$", README, re.MULTILINE)
  return [[cell.strip() for cell in line.split("|")] for line in lines][2:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
    if "://" not in target:
      assert (page.parent / target).exists(), f"{page.name}: {target}"


@needs_library
@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0])
def test_table_names_what_exists(row):
  _, imported, page = row
  for name in re.findall(r"`([\w.]+)`", imported):
    home, _, last = name.rpartition(".")
    assert hasattr(importlib.import_module(home), last), name
    page_file = ROOT / re.search(r"\((.*?)\)", page)[1]
    assert last in page_file.read_text(), f"{page_file.name} lacks {last}"


@needs_library
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page):
  commands = r"python -m ((?:experiments|pallas_kernels)\.[\w.]*\w)"
  for module in re.findall(commands, page.read_text()):
    path = ROOT / module.replace(".", "/")
    run = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert run.exists(), module
  for path in re.findall(r"\bconfigs/[a-z]\w*\.py", page.read_text()):
    assert (ROOT / path).exists(), path


@needs_library
def test_readme_examples_run():
  namespace = {}
  examples = list(
    re.finditer(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
  )
  assert examples
  for example in examples:
    # Padded, so that an error names README's own line.
    above = README[: example.start(1)].count("\n")
    code = compile("\n" * above + example[1], ROOT / "README.md", "exec")
    exec(code, namespace)


def test_every_public_name_has_a_page():
  modules = coverage_check.public_modules(importlib.import_module("sparsejax"))
  pages = coverage_check.read_pages(ROOT / "docs")
  documented = coverage_check.documented_names(pages)
  assert not coverage_check.missing_names(modules, documented)


@pytest.fixture
def forged(monkeypatch):
  """A module `forged` with a public function, an alias of it and others."""
  module = types.ModuleType("forged")
  exec(
    "import math\nfrom functools import partial\nLIMIT = 3\n"
    "def shown(): pass\nalias = shown\ndef _hidden(): pass\n",
    vars(module),
  )
  monkeypatch.setitem(sys.modules, "forged", module)
  return module


def test_coverage_check_finds_a_missing_name(forged):
  page = "text\n\n```{eval-rst}\n.. autofunction:: forged.other\n```\n"
  documented = coverage_check.documented_names([page])
  assert documented == {"forged.other"}
  missing = coverage_check.missing_names([forged], documented)
  assert missing == ["forged.shown", "forged.alias"]
  # An object that is documented under one name is documented.
  page += "```{eval-rst}\n.. autofunction:: forged.shown\n```\n"
  documented = coverage_check.documented_names([page])
  assert not coverage_check.missing_names([forged], documented)


def test_coverage_check_obeys_all(forged):
  forged.__all__ = ["LIMIT", "part"]
  forged.part = types.ModuleType("forged.part")
  forged.part.__all__ = ["inner"]
  forged.part.inner = 1
  missing = coverage_check.missing_names([forged], [])
  assert missing == ["forged.LIMIT", "forged.part.inner"]
