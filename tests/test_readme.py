"""README and Makefile against the tree."""

import re
import subprocess

from toys import ROOT

README = (ROOT / "README.md").read_text()


def test_every_make_target_in_the_readme_exists_and_is_listed():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {line.split()[0] for line in listed.splitlines()}
    mentioned = set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.MULTILINE))
    named = {a or b for a, b in mentioned}
    assert {"run", "test", "ui"} <= named <= targets


def test_the_folder_tree_is_true():
    tree = README.split("## Where things are")[1].split("```")[1]
    room = ""
    for line in filter(str.strip, tree.splitlines()):
        indented = line.startswith("  ")
        for name in re.match(r"\s*((?:\S+  ?)+)", line)[1].split("  "):
            name = name.strip()
            if not re.fullmatch(r"[\w.]+/?", name):
                continue
            path = ROOT / room / name if indented else ROOT / name
            assert path.exists(), name
        if not indented and line.startswith("edgeke/"):
            room = "edgeke"


def test_links_and_pictures_exist():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), (document.name, target)


def test_experiments_in_the_readme_name_real_parameters():
    import yaml

    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key in re.findall(r"-S '?([\w.]+)=", README):
        section = content
        for part in key.split("."):
            assert part in section, key
            section = section[part]
