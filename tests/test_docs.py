"""The pages agree with the code: settings, messages, links, commands."""

import ast
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from unittest.mock import patch
from urllib.parse import unquote

import pytest
import torch
import torchtitan
import write_settings
from helpers.commands import ROOT
from helpers.streams import documents, loader, stopped, stream
from markdown_it import MarkdownIt
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan_ext.cli import PUBLISHED
from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.jobs.memory import no_estimate_reason, peak_memory
from torchtitan_ext.jobs.preflight import Plan
from torchtitan_ext.jobs.rules import job_problems, parallel_dims
from torchtitan_ext.model import flavors
from torchtitan_ext.model.model import meta_model
from torchtitan_ext.model.settings import Lighthouse

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "patches/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "results").glob("**/README.md"))


def test_the_settings_page_is_what_the_script_writes():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == write_settings.reference(), "docs/settings.md is out of date: make docs"


def test_a_field_without_a_docstring_is_named():
    @dataclass(frozen=True)
    class More(Lighthouse):
        threshold: float = 0.0

    with pytest.raises(ValueError, match=r"lighthouse\.threshold in .*no docstring"):
        [*write_settings.setting_rows("lighthouse", More)]


def test_the_picture_of_the_method_is_drawn(command, tmp_path):
    command("draw_method", "--output", tmp_path)
    assert (tmp_path / "method.png").read_bytes().startswith(b"\x89PNG")


@cache
def links_and_anchors(page):
    """Where a page's links and pictures lead to, and the anchors of its headings, by GitHub's rule."""
    links, anchors = [], set()
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    for before, token in zip([None, *tokens], tokens, strict=False):
        for child in token.children or ():
            links += [child.attrs[name] for name in ("href", "src") if name in child.attrs]
        if before and before.type == "heading_open":
            words = "".join(c.content for c in token.children).lower()
            anchors.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return links, anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for link in links_and_anchors(page)[0]:
        if ":" in link:
            continue  # another site
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in links_and_anchors(target)[1]):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_readmes_index():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_and_anchors(PAGES[0])[0]}
    assert set((ROOT / "docs").glob("*.md")) <= linked


@cache
def messages():
    """The texts in the sources of the package and of the patched torchtitan, with … for what they fill in."""
    found = []
    for folder in (ROOT / "torchtitan_ext", Path(next(iter(torchtitan.__path__)))):
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", None) for part in node.values]
                    found.append("".join(p if isinstance(p, str) else "…" for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


QUOTED = re.findall(r"^\| `([^`|]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
assert QUOTED


@pytest.mark.parametrize("message", QUOTED)
def test_every_message_that_is_explained_exists(message):
    assert message in messages()


@cache
def code(page, language):
    tokens = MarkdownIt().parse(page.read_text())
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_and_scripts_that_are_named_exist(page):
    commands = "\n".join(code(page, "bash"))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE)) <= set(targets)
    assert all((ROOT / name).is_file() for name in re.findall(r"\bscripts/\S+", commands))


def launches():
    """Each documented launch of a job file: the file, the number of GPUs and what overrides it."""
    for page in PAGES:
        for line in "\n".join(code(page, "bash")).replace("\\\n", " ").splitlines():
            given = dict(re.findall(r"\b(nproc|[A-Za-z_]+(?==))[ =](\S+)", line))
            words = shlex.split(re.sub(r"--nproc \S+", "", line), comments=True)
            if "--job.config_file" in words and "--help" not in words:
                file, *overrides = words[words.index("--job.config_file") + 1 :]
            elif "CONFIG" in given:
                [script] = [i for i, word in enumerate(words) if word.startswith("scripts/train.")]
                file, overrides = given["CONFIG"], words[script + 1 :]
            else:
                continue
            n_gpus = given.get("NGPU") or given.get("nproc_per_node") or given.get("nproc")
            n_gpus = n_gpus or (1 if "configs/text" in file else 8)
            n_nodes = given.get("nodes") or given.get("nnodes") or given.get("NNODES") or 1
            yield file, int(n_gpus) * int(n_nodes), tuple(overrides)


LAUNCHES = sorted(set(launches()))
assert len(LAUNCHES) > 10
REFUSED = "--training.seq_len 5000"  # as the page says


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: " ".join(map(str, launch[2])))
def test_documented_launches_are_legal_and_fit(launch, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_data", ModuleType("my_data"))  # which data.md shows
    monkeypatch.setitem(DATASETS, "my_csv", DATASETS["c4"])
    file, n_gpus, overrides = launch
    for stage in {file, file.replace("stage1", "dense")}:  # stage 2 is dense too
        # Other checkpoints, tokenizers and data than the repository's are the reader's.
        job = parse_job(stage, overrides)
        problems = [p for p in job_problems(job, n_gpus, with_start=False) if not re.search("tokenizer|/data/", p)]
        assert bool(problems) == (REFUSED in " ".join(overrides) and job.lighthouse.enable), problems
        if not problems and not no_estimate_reason(job, parallel_dims(job, n_gpus)):
            plan = Plan.of(job, n_gpus)
            assert sum(peak_memory(job, plan.args, plan.dims).values()) < 139  # GiB of an H200


def test_the_flavor_that_is_shown_is_legal(monkeypatch):
    [example] = code(ROOT / "docs" / "extend.md", "python")
    monkeypatch.setitem(flavors, "mine", None)  # so that it goes with this test
    exec(example, {})
    assert 5e8 < sum(p.numel() for p in meta_model(flavors["mine"]).parameters()) < 1e9


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/layer.md"])
def test_the_examples_of_the_layer_run_from_top_to_bottom(page):
    shown = {}
    for example in code(ROOT / page, "python"):
        exec(example, shown)
    shown["out"].sum().backward()
    trained = [shown["q"], *shown.get("model", torch.nn.Module()).parameters()]
    assert shown["out"].shape == shown["q"].shape and all(x.grad.any() for x in trained)


@patch.dict(DATASETS)  # so that it goes with this test
def test_the_data_set_that_is_shown_is_read_whole_shared_out_and_resumed(tmp_path):
    [example] = code(ROOT / "docs" / "data.md", "python")
    texts = [f"text {i}" for i in range(6)]
    for i in range(2):
        (tmp_path / f"{i}.csv").write_text("\n".join(["number,text", *(f"{i},{text}" for text in texts[i::2])]))
    known = set(DATASETS)
    exec(example, {})
    [name] = set(DATASETS) - known
    ranks = [documents(name, tmp_path, rank=rank, world=2) for rank in range(2)]
    drawn, _ = stopped(lambda: loader(name, tmp_path, 3), 9, 30)  # into the next pass
    expected = stream(islice(loader(name, tmp_path, 3), 39))
    assert [[text.decode() for text in rank] for rank in ranks] == [texts[0::2], texts[1::2]]
    assert drawn == expected
    (tmp_path / "1.csv").write_text(f"text\n{'long ' * 10**5}")  # csv's own limit is 131,072 characters
    assert max(len(row["text"]) for row in DATASETS[name].loader(tmp_path)) == 5 * 10**5


def test_the_settings_to_choose_from_are_the_published_grid():
    page, published = (ROOT / "docs/running.md").read_text(), tomllib.loads(PUBLISHED.read_text())
    for row in published["ablations"]:
        cell = row["settings"]["lighthouse"]
        sizes = f"{cell['levels']}, {cell['pooling_factor']}, {cell['top_k']:,}"
        degree = row["settings"].get("parallelism", {}).get("context_parallel_degree")
        more = rf",.* {degree} GPUs per sequence" if degree else ""
        numbers = f"{row['device_hours']:,} | {row['final_loss']:.4f}"
        assert re.search(rf"^\| {sizes} \| `{cell['scorer']}`{more} \| {re.escape(numbers)} \|$", page, re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_end_at_120_columns_but_for_tables_pictures_and_what_a_link_leads_to(page):
    lines = re.sub(r"\]\([^)\n]*\)", "]", page.read_text()).splitlines()
    assert not [line for line in lines if len(line) > 120 and line[0] not in "|!"]


def test_the_readme_fits_on_one_screen():
    readme = PAGES[0].read_text()
    assert len(readme.splitlines()) <= 120 and len(readme.split()) <= 1000
