"""What the readme says to paste works when pasted, and links between pages lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_helpers import PROJECT

SECTION = re.search(r"^## Your own network$(.*?)^## ", (PROJECT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def _pasted(language, program, folder):
    """Give the section's block in a language to a program, in a folder, where ``lowrank`` and ``python`` are ours."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", SECTION[1], re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        program, input=block, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return block, done.stdout


def test_links_between_pages_lead_somewhere():
    for page in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]:
        links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
        assert all((page.parent / link).exists() for link in links), page


@pytest.mark.slow
def test_the_commands_for_your_own_network_work(tmp_path):
    block, output = _pasted("sh", ["bash", "-e"], tmp_path)
    assert (
        len(re.findall(r"^layer4\.1\.conv2 +512×512·3·3 +512/512 ", output, re.MULTILINE))
        == block.count("analyze")
        == 3
    )
    assert {file.name for file in (tmp_path / "reports" / "resnet18").iterdir()} == {"index.html", "results.json"}


@pytest.mark.slow
def test_the_program_for_your_own_network_works(tmp_path):
    block, output = _pasted("python", [sys.executable, "-"], tmp_path)
    assert len([line for line in block.splitlines() if line]) <= 10
    assert re.search(r"^parameters: 11,689,512 → 5,[\d,]+ \((49|50)\.\d%\)$", output, re.MULTILINE)
    assert re.search(
        r"^seconds: .* → .*\nrelative change of the outputs: predicted .*, measured .*\n\S+: rank ",
        output,
        re.MULTILINE,
    )
