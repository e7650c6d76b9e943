"""What the pages say of the code is there, and links lead somewhere."""

from __future__ import annotations

import ast
import re

import pytest
import yaml

from spml_fast.methods import method_names
from tests.support.docs import PAGES
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
ALL = [*PAGES, ROOT / "CHANGELOG.md"]


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def environment_names() -> set[str]:
    """Every variable that the packages read or set: constants of that form in files that use `os.environ`."""
    names: set[str] = set()
    for folder in ("spml_fast", "kernels/spml_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if "environ" not in source:
                continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names |= {node.value} if re.fullmatch(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+|RANK", node.value) else set()
                elif isinstance(node, ast.keyword) and node.arg and re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", node.arg):
                    names.add(node.arg)
    return {name for name in names if not name.startswith("SC_")}  # sysconf's


def test_every_environment_variable_is_documented():
    names = environment_names()
    assert {"SPML_KERNELS", "RANK", "SLURM_PROCID", "MASTER_PORT", "DS_ACCELERATOR"} <= names
    page = text_of("environment.md")
    assert not [name for name in sorted(names) if f"`{name}`" not in page]


def test_every_method_is_documented():
    page = text_of("methods.md")
    assert not [name for name in method_names() if f"`{name}`" not in page]
    api = text_of("api/methods.md")
    files = {path.stem for path in (ROOT / "spml_fast" / "methods").glob("*.py")} - {"__init__", "losses"}
    assert set(re.findall(r"^::: spml_fast\.methods\.(\w+)$", api, flags=re.M)) == files
    words = {18: "eighteen", 22: "twenty-two"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"all {words[len(method_names())]} methods" in readme
    assert f"and {words[len(method_names()) - 4]}\nlosses" in readme, "besides LL-R, LL-Ct, LL-Cp and IGNORE"


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 110 and len(readme.split()) <= 900
    first = readme.index("pip install -e . && deepspeed launch/train.py")
    assert first < readme.index("pip install -e '.[test]' && pytest") < 2000


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them; and those written out."""
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text)) | set(re.findall(r"\{ ?#([\w-]+)", text))
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\{.*\}|`", "", heading).strip().lower())
        found.add(re.sub(r"[\s]+", "-", plain.strip()))
    return found


@pytest.mark.parametrize("page", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_folders_and_files_that_pages_name_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:spml_fast|kernels|tests|benchmarks|launch|docs|\.ci)/[\w./-]+)`", text):
            # Placeholders are in capitals; what a run leaves in results/ is not there yet.
            if not re.search(r"\b(NAME|OP|X)\b|OP\.py", name) and not name.endswith("/results/"):
                assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """mkdocs' own tags mean nothing here."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def leaves(item: object) -> list[str]:
        if isinstance(item, str):
            return [item]
        return [leaf for part in (item.values() if isinstance(item, dict) else item) for leaf in leaves(part)]  # type: ignore[attr-defined]

    shown = sorted(leaves(config["nav"]))
    assert shown == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))
    assert config["theme"]["font"] is False, "nothing is fetched from the network"
    assert "extra_javascript" not in config
