"""What README, its Chinese twin and the handbook say is what the scripts do.

Every command is read by the flags' own parser, every default looked up, every link followed. What
nothing here can check is whether a sentence is true: who changes a promise, changes its sentence.
"""

import dataReader
import network
import train
import weightInit

import ast
import importlib
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

README, CHINESE, HANDBOOK = "README.md", ".github/README.zh-CN.md", ".github/HANDBOOK.md"
PAGES = [README, CHINESE, HANDBOOK]
SCRIPTS = ["pretreat.py", "dataReader.py", "weightInit.py", "network.py", "train.py",
           "generator.py"]
WITH_FLAGS = ["pretreat.py", "dataReader.py", "train.py", "generator.py"]
ORDER = ["See faces now", "Watch it learn on this machine", "CelebA on a GPU", "Your own pictures",
         "Settings", "Going on, stopping, when it goes wrong", "How good, how fast", "What it is",
         "Licence", "References"]
CHINESE_ONLY = ["国内镜像", "在 AI Studio 上运行", "常见报错"]
CELEBA = 202_599   # images
DEMO_PHOTOS = 2000
OF_OTHERS = {      # flags of other programs
    "--devices", "--nproc_per_node", "--backend", "--master", "--nnodes", "--rank",  # launcher's
    "--slow",                                                                        # conftest.py's
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def without_chinese_only(text):
    """The Chinese page without the sections that the English one does not have."""
    for title in CHINESE_ONLY:
        text, cut = re.subn(rf"(?ms)^### {title}$.*?(?=^##)", "", text)
        assert cut == 1, title
    return text


def code(text):
    """A page's commands and what is in `…`, in order; lines of a block without their comments."""
    for block, inline in re.findall(r"(?s)```bash\n(.*?)```|```python.*?```|`([^`]+)`", text):
        for line in block.splitlines():
            line = re.sub(r"(^|\s+)#.*", "", line)
            if line:
                yield line
        if inline:
            yield " ".join(inline.split())


def commands(text):
    return [part.strip() for line in code(text) if line.startswith("python ")
            for part in line.split("&&")]


def tables(text):
    """The tables of a page: a list of rows each, the header first; a row is a list of cells."""
    for table in re.findall(r"(?m)(?:^ *\|.*\n)+", text):
        rows = [[cell.strip() for cell in line.strip(" |").split(" | ")]
                for line in table.splitlines()]
        del rows[1]  # | --- |
        yield rows


def script_module(script):
    return importlib.import_module(script.removesuffix(".py"))


def parse(monkeypatch, script, flags):
    """The options of a script for a list of flags; SystemExit if it refuses them."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    return vars(dataReader.command_line(vars(script_module(script))))


def defaults(monkeypatch, script):
    options = parse(monkeypatch, script, [])
    del options["demo"]
    return options


def check_command(command, monkeypatch):
    """Fail unless a command is one that its program understands."""
    program, *words = shlex.split(command)
    if program == "source":  # what `python3 -m venv` makes
        return
    assert program == "python" or command == "python3 -m venv .venv"
    if words[:2] == ["-m", "paddle.distributed.launch"]:
        words = words[words.index("train.py"):]
    if words[0] in WITH_FLAGS:
        parse(monkeypatch, words[0], words[1:])
    elif words[0] == "tests/bench.py":
        source = read("tests/bench.py")
        for flag in words[1:]:
            assert not flag.startswith("--") or f'"{flag}"' in source
    elif words[:3] in (["-m", "pip", "install"], ["-m", "pip", "uninstall"]):
        for before, file in zip(words, words[1:], strict=False):
            assert before != "-r" or (ROOT / file).is_file()
    elif words[:3] == ["-m", "pip", "config"]:
        assert words[3] == "set"
    elif words[:2] == ["-m", "pytest"]:
        assert (ROOT / words[-1]).exists()
    else:
        assert words[:2] in (["-m", "venv"], ["-m", "pytorch_fid"]) or words[0] == "-c"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page, monkeypatch):
    found = commands(read(page))
    assert len(found) > 8
    for command in found:
        try:
            check_command(command, monkeypatch)
        except (SystemExit, AssertionError) as error:
            pytest.fail(f"{page} has `{command}`: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one(page, monkeypatch):
    """Flags outside commands, such as `--augment` and `--change --g_steps 3`, are some script's."""
    known = set(OF_OTHERS) | {"--help", "--demo"}
    for script in WITH_FLAGS:
        for name, value in defaults(monkeypatch, script).items():
            known.add(f"--{name}")
            if value is True or value is False:
                known.add(f"--no-{name}")
    bench = set(re.findall(r'"(--\w+)"', read("tests/bench.py")))
    for text in code(read(page)):
        if text.startswith("--"):
            words = text.split()
            flags = {word for word in words if word.startswith("--")}
            assert flags <= known | bench, text
            if len(words) > 1 and not flags & OF_OTHERS:
                assert any(accepted(monkeypatch, script, words) for script in WITH_FLAGS), text


def accepted(monkeypatch, script, flags):
    try:
        parse(monkeypatch, script, flags)
    except SystemExit:
        return False
    return True


def shown(value):
    """How a table shows a default: in English and in Chinese."""
    if value is False:
        return {"off", "关"}
    if value in ("", None, []):
        return {"none"}
    return {f"`{value}`"} if isinstance(value, str) else {str(value)}


def settings_tables(page):
    """(script, {name: default as the page shows it}) of each table of settings."""
    for rows in tables(read(page)):
        if len(rows[0]) > 1 and rows[0][1] in ("default", "默认值"):
            title = rows[0][0].strip("`")
            script = "train.py" if title in ("setting", "设置") else title
            yield script, {row[0].strip("`"): row[1] for row in rows[1:]}


@pytest.mark.parametrize("page", PAGES)
def test_defaults_in_tables_are_the_scripts(page, monkeypatch):
    found = list(settings_tables(page))
    assert found
    for script, table in found:
        real = defaults(monkeypatch, script)
        for name, text in table.items():
            assert name in real, f"{script} has no setting {name}"
            if name != "threads":  # depends on the machine
                assert text in shown(real[name]), f"{script}: {name} is {real[name]}"


def test_the_handbook_has_every_setting(monkeypatch):
    described = dict(settings_tables(HANDBOOK))
    assert described.keys() == set(WITH_FLAGS)
    for script, table in described.items():
        assert table.keys() == defaults(monkeypatch, script).keys(), script


def test_both_readmes_have_the_same_settings():
    (_, english), = settings_tables(README)
    (_, chinese), = settings_tables(CHINESE)
    assert list(english) == list(chinese)
    assert len(english) == 10


def test_iterations_are_rightly_computed(monkeypatch):
    def iterations(images, options):
        return images // options["batch_size"] * options["epochs"]

    english, chinese, handbook = map(read, PAGES)
    whole = defaults(monkeypatch, "train.py")
    epoch = f"{CELEBA // whole['batch_size']:,}"
    assert f"{whole['epochs']} epochs of {epoch} iterations" in english
    assert f"{whole['epochs']} 轮（epoch），每轮 {epoch} 次迭代" in chinese
    assert f"{whole['epochs']} epochs, {iterations(CELEBA, whole):,} iterations" in handbook

    demo = parse(monkeypatch, "train.py", ["--demo"])
    total, every = iterations(DEMO_PHOTOS, demo), demo["sample_every"]
    assert f"trains a small network: {total:,} iterations" in english
    assert f"训练一个小网络：{total:,} 次迭代" in chinese
    assert f"every {every} iterations" in " ".join(english.split())
    assert f"每 {every} 次迭代" in chinese

    for page in english, chinese:
        rows = next(rows for rows in tables(page) if rows[1][1].startswith("`--"))[1:]
        assert len(rows) == 3
        for images, flags, stated in rows:
            options = parse(monkeypatch, "train.py", flags.strip("`").split())
            assert f"{iterations(int(images.replace(',', '')), options):,}" == stated


def test_numbers_in_sentences_are_the_scripts():
    english, chinese, handbook = (" ".join(read(page).split()) for page in PAGES)
    assert f"the last {train.save_minutes:g} minutes" in english
    assert f"最后 {train.save_minutes:g} 分钟" in chinese
    assert f"{train.save_minutes:g} minutes (`--save_minutes`) and {train.log_every} " in handbook
    assert f"{train.keep} stay." in english
    assert f"保留 {train.keep} 个。" in chinese
    assert f"After {train.D_WON_AFTER} such iterations" in handbook


def test_the_trained_generator_is_as_described():
    _, info = weightInit.read_tensors(ROOT / ".github/celeba.safetensors", "generator")
    assert f"{info['step']:,} iterations of `train.py`" in " ".join(read(README).split())
    assert f"训练 {info['step']:,} 次迭代得到" in read(CHINESE)
    for page in README, CHINESE:
        assert (f"`--width {info['width']} --batch_size 32 --learning_rate 0.0005 --flip`"
                in " ".join(read(page).split()))


def test_a_generator_is_given_away_as_the_handbook_says(tmp_path, monkeypatch):
    given = ROOT / ".github/celeba.safetensors"
    (tmp_path / "Output").mkdir()
    monkeypatch.chdir(tmp_path)
    generator, info = network.load_generator(given)
    trained = Path("Output/generator.safetensors")
    network.save_generator(trained, generator, generator, info["noise"], info["step"])
    script, = re.findall(r"(?s)```python\n(.*?)```", read(HANDBOOK))
    exec(compile(script, HANDBOOK, "exec"), {})
    assert Path("given.safetensors").read_bytes() == given.read_bytes()
    assert given.stat().st_size < 0.3 * trained.stat().st_size


def test_both_readmes_have_the_same_commands_and_tables():
    english, chinese = read(README), without_chinese_only(read(CHINESE))
    assert list(commands(english)) == list(commands(chinese))
    for ours, theirs in zip(tables(english), tables(chinese), strict=True):
        assert [len(row) for row in ours] == [len(row) for row in theirs]


def test_both_readmes_have_the_same_numbers():
    sections = [re.split("(?m)^## ", text)
                for text in (read(README), without_chinese_only(read(CHINESE)))]
    for english, chinese in zip(*sections, strict=True):
        ours, theirs = (Counter(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)*|[½¼¾]", text))
                        for text in (english, chinese))
        assert ours == theirs, english.splitlines()[0]


def slugs(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"(?s)```.*?```", "", read(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"(?m)^#+ (.*)$", text)}


def links(page):
    text = re.sub(r"(?s)```.*?```", "", read(page))
    return re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    found = ["".join(pair) for pair in links(page)]
    assert len(found) > 5
    for link in found:
        path, _, anchor = link.partition("#")
        if not re.match("https?:", link):
            target = ((ROOT / page).parent / path if path else ROOT / page).resolve()
            assert target.is_file(), link
            assert not anchor or anchor in slugs(target.relative_to(ROOT)), link


def test_every_picture_is_shown_and_small():
    shown = {"".join(pair).rsplit("/", 1)[-1] for page in PAGES for pair in links(page)}
    pictures = [path for path in (ROOT / ".github").iterdir() if path.suffix in (".png", ".gif")]
    assert {path.name for path in pictures} <= shown
    for path in pictures:
        assert path.stat().st_size <= 500_000, path.name


# names of what is written, or made by hand
WRITTEN = r"\d{4}_\d{4}\.(png|safetensors)|\d{6}\.png|party-face\d\.png|given\.safetensors"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_are_there_or_made(page, monkeypatch):
    texts = " ".join(read(script) for script in SCRIPTS)
    folders = {"", "individual", "log"}
    for script in WITH_FLAGS:
        for flags in [], ["--demo"]:
            options = parse(monkeypatch, script, flags)
            folders |= {options.get("output_path"), options.get("output")}
    for command in commands(read(page)):
        folders |= set(re.findall(r"--output(?:_path)? (\S+)", command))
    named = re.findall(r"(?<![\w./])[\w./-]+\.(?:py|png|gif|csv|safetensors|txt)\b", read(page))
    assert len(named) > 20
    for name in named:
        folder, _, base = name.rpartition("/")
        if not ((ROOT / name).is_file() or ((ROOT / page).parent / name).is_file()):
            assert base in texts or re.fullmatch(WRITTEN, base), f"{page}: {name}"
            assert folder in folders, f"{page}: {name}"


def test_readme_is_short_and_in_order():
    english = read(README)
    assert len(english) <= 11_000
    assert re.findall("(?m)^## (.*)$", english) == ORDER
    chinese = re.findall("(?m)^## (.*)$", read(CHINESE))
    assert len(chinese) == len(ORDER)
    assert "中文说明（AI Studio、镜像、常见报错）" in english[:600]
    for page in README, CHINESE:
        assert "<details" not in read(page)


def messages():
    """What the scripts can print: their texts, with … where a value is put in."""
    for script in SCRIPTS:
        for node in ast.walk(ast.parse(read(script))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…"
                              for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_errors_in_the_chinese_table_are_the_scripts():
    foreign = {"Cannot load cudnn shared library", "CUDA driver version is insufficient",
               "ResourceExhaustedError", "No matching distribution found for paddlepaddle-gpu",
               "No module named 'paddle.fluid'", "externally-managed-environment",
               "No module named 'paddle'", "No module named 'skimage'",
               "Could not open requirements file"}
    rows = next(rows for rows in tables(read(CHINESE)) if rows[0][0] == "报错中的关键字")[1:]
    known = list(messages())
    words = [word for row in rows for word in re.findall("`(.*?)`", row[0])]
    assert foreign < set(words)
    for word in set(words) - foreign:
        # what stands for a value: an ellipsis, or an example of one
        parts = re.split(r"…|\bOutput/generator\.safetensors|\bOutput\b|\bimgs\b", word)
        pattern = ".*".join(map(re.escape, parts))
        assert any(re.search(pattern, message, re.DOTALL) for message in known), word


def test_ci_runs_commands_that_readme_has():
    wanted = re.findall("readme '(.*)'", read(".ci/run"))
    assert wanted
    for start in wanted:
        assert any(line.startswith(start) for line in code(read(README))), start
