"""What the real TensorBoard shows of two runs, one of them resumed, asked over HTTP."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image
from test_cli import POC, SMALL

from ppo_tbptt.cli import main
from ppo_tbptt.run.event_files import read_events
from ppo_tbptt.run.metrics import Report, read_metrics
from ppo_tbptt.run.tensorboard import SAMPLE_SIZE, TensorBoard, histograms_due

STEPS = 64  # an iteration


def gif(shade: int) -> bytes:
    """Two frames of 8 x 6."""
    frames = [Image.new("L", (8, 6), shade + i) for i in range(2)]
    buffer = BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain`` is 4 iterations. ``resumed`` was done after 12, lost its last checkpoints, went on from 10 to 13, was
    resumed with nothing left to train, and then for one iteration more."""
    folder = tmp_path_factory.mktemp("runs")
    small = [*SMALL, "--train.eval-every", "2"]
    assert main(["train", POC, "--run-dir", str(folder / "plain"), "--total-steps", str(4 * STEPS), *small]) == 0
    run = folder / "resumed"
    command = ["train", POC, "--run-dir", str(run), "--train.checkpoint-every", "1", "--total-steps", str(12 * STEPS)]
    assert main([*command, *small]) == 0
    board = TensorBoard(run)
    for iteration in range(1, 13):
        board.image("video/episode", gif(iteration), 8, 6, iteration * STEPS)
    board.close()
    for iteration in (11, 12):
        (run / "checkpoints" / f"iteration_{iteration:07d}.pt").unlink()
    for total in (13, 13, 14):
        assert main(["train", "--resume", str(run), "--total-steps", str(total * STEPS)]) == 0
    return folder


class Server:
    """TensorBoard on a folder, and what it answers."""

    def __init__(self, logdir: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if " at http://" in line:
                self.url = line.split(" at ")[1].split()[0]
                return
        raise AssertionError("".join(said))

    def read(self, path: str, **query: str) -> bytes:
        with urlopen(f"{self.url}data/{path}?{urlencode(query)}") as answer:
            return answer.read()

    def get(self, path: str, **query: str) -> Any:
        return json.loads(self.read(path, **query))

    def post(self, path: str, content: object) -> Any:
        request = Request(f"{self.url}data/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            return json.load(answer)

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module", params=["fast", "slow"])
def server(runs: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """With either of the two programs that read event files; the fast one where there is one for this machine."""
    load_fast = "auto" if request.param == "fast" else "false"
    with closing(Server(runs, "--load_fast", load_fast, "--reload_interval", "1")) as server:
        deadline = time.monotonic() + 60
        done: set[str] = set()
        while done != {"plain", "resumed"}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            tags = server.get("plugin/scalars/tags")  # of which the last one is
            done = {run for run in tags if "final/success" in tags[run]}
        yield server


def test_every_scalar_is_that_of_the_file(server: Server, runs: Path) -> None:
    """Each point once and none missing, also where a run went on from an earlier checkpoint."""
    for run, tags in server.get("plugin/scalars/tags").items():
        rows = read_metrics(runs / run / "metrics.jsonl")
        assert len(rows) == {"plain": 4, "resumed": 14}[run]
        known = dict.fromkeys(key for row in rows for key in row if key not in ("iteration", "env_steps"))
        assert {tag for tag in tags if not tag.startswith("final/")} == set(known)
        for tag in known:
            shown = server.get("plugin/scalars/scalars", run=run, tag=tag)
            written = [(row["env_steps"], row[tag]) for row in rows if tag in row]
            assert [step for _, step, _ in shown] == [step for step, _ in written], tag
            assert [value for _, _, value in shown] == pytest.approx([value for _, value in written], rel=1e-6), tag


def test_the_table_has_one_row_per_run_with_its_final_measures(server: Server, runs: Path) -> None:
    columns = server.post("plugin/hparams/experiment", {})
    shown_by_default = {info["name"] for info in columns["hparamInfos"] if info.get("differs")}
    assert {"core.kind", "env.id", "seed"} <= shown_by_default and "ppo.gamma" not in shown_by_default
    metrics = [info["name"]["tag"] for info in columns["metricInfos"]]
    assert metrics == ["final/headline", "final/headline_without_memory", "final/success"]
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    asked = {"startIndex": 0, "sliceSize": 99, "allowedStatuses": statuses, "colParams": []}
    rows = server.post("plugin/hparams/session_groups", asked)["sessionGroups"]
    assert sorted(row["name"] for row in rows) == ["plain", "resumed"]
    for row in rows:
        run, (session,) = row["name"], row["sessions"]
        iterations = {"plain": 4, "resumed": 14}[run]
        final = json.loads((runs / run / "evaluations" / "final.json").read_text())
        shown = {value["name"]["tag"]: value for value in session["metricValues"]}
        assert sorted(shown) == metrics
        assert shown["final/headline"]["value"] == pytest.approx(final["measures"]["success"]["mean"])
        assert shown["final/headline_without_memory"]["value"] == pytest.approx(final["headline_without_memory"])
        for tag in metrics:
            assert len(server.get("plugin/scalars/scalars", run=run, tag=tag)) == 1
        assert {value["trainingStep"] for value in shown.values()} == {iterations * STEPS}
        hparams = row["hparams"]
        assert hparams["total_steps"] == iterations * STEPS  # not that of before it was resumed
        assert hparams["env.id"] == "ppo_tbptt/PocMemory-v0"
        assert hparams["ppo.normalize_advantage"] in (True, False)
        assert hparams["model.vector_hidden_sizes"] == "[64]"


def test_the_page_of_custom_scalars(server: Server) -> None:
    categories = server.get("plugin/custom_scalars/layout")["category"]
    charts = {chart["title"]: chart["multiline"]["tag"] for category in categories for chart in category["chart"]}
    found = {}
    for title, patterns in charts.items():
        answers = [server.get("plugin/custom_scalars/scalars", run="resumed", tag=pattern) for pattern in patterns]
        found[title] = [tag for answer in answers for tag in answer["tag_to_events"]]
    assert all(found.values()) and len(found) == 9
    assert found["return on held-out levels"] == ["eval/return"]
    assert found["approximate KL and clip fraction"] == ["policy/approx_kl", "policy/clip_fraction"]


def test_texts(server: Server, runs: Path) -> None:
    found = {run: sorted(tags) for run, tags in server.get("plugin/text/tags").items()}
    assert found == {run: ["command", "config", "versions"] for run in ("plain", "resumed")}
    for run, starts in (("plain", [0]), ("resumed", [0, 10 * STEPS, 13 * STEPS])):
        texts = {tag: server.get("plugin/text/text", run=run, tag=tag) for tag in ("command", "config", "versions")}
        assert {tag: [text["step"] for text in shown] for tag, shown in texts.items()} == dict.fromkeys(texts, starts)
        assert f"total_steps = {4 * STEPS if run == 'plain' else 14 * STEPS}" in texts["config"][-1]["text"]
        assert f"torch {torch.__version__.split('+')[0]}" in texts["versions"][-1]["text"]


def test_histograms_and_images_of_a_resumed_run(server: Server) -> None:
    """What was beyond the checkpoint is gone; what was drawn again is there once."""
    for name in ("state", "value", "advantage"):
        shown = server.get("plugin/histograms/histograms", run="resumed", tag=f"hist/{name}")
        assert [step for _, step, _ in shown] == [1 * STEPS, 11 * STEPS]
        counts = [sum(count for _, _, count in bins) for _, _, bins in shown]
        assert counts == [SAMPLE_SIZE if name == "state" else STEPS] * 2
    images = server.get("plugin/images/images", run="resumed", tag="video/episode", sample="0")
    assert [image["step"] for image in images] == [iteration * STEPS for iteration in range(1, 11)]
    assert server.read("plugin/images/individualImage", **dict(parse_qsl(images[2]["query"]))) == gif(3)


def test_a_server_that_was_watching_when_a_run_went_on(tmp_path: Path) -> None:
    """It forgets what it has read beyond the checkpoint."""

    def play(iterations: range, loss: float, after: int | None = None) -> None:
        board = TensorBoard(tmp_path, after=after)
        for i in iterations:
            board.write(Report(iteration=i, env_steps=i, scalars={"loss/total": loss}))
        board.close()

    def wait(points: list[tuple[int, float]]) -> None:
        deadline = time.monotonic() + 60
        shown = None
        while shown != points:
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
            if "loss/total" in server.get("plugin/scalars/tags").get(".", {}):
                answer = server.get("plugin/scalars/scalars", run=".", tag="loss/total")
                shown = [(step, value) for _, step, value in answer]

    with closing(Server(tmp_path, "--load_fast", "false", "--reload_interval", "1")) as server:
        play(range(1, 7), 1.0)
        wait([(i, 1.0) for i in range(1, 7)])
        play(range(4, 6), 2.0, after=3)
        wait([(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)])


def test_histograms_are_of_finite_values_from_everywhere(tmp_path: Path) -> None:
    """Also where a fixed stride would meet the same unit of the state again and again."""
    board = TensorBoard(tmp_path)
    constant, odd = torch.full((3, 2), 4.0), torch.tensor([1.0, torch.nan, torch.inf])
    state = torch.arange(128.0).expand(64, 32, 128)
    board.histograms({"constant": constant, "odd": odd, "empty": torch.empty(2, 0), "nan": odd[1:], "state": state}, 5)
    board.histograms({"nan": odd[1:]}, 6)
    board.close()
    (path,) = tmp_path.iterdir()
    (event,) = [event for event, _ in read_events(path)][2:]  # after the header
    shown = {value.tag: value.histo for value in event.summary.value}
    assert {tag: histo.num for tag, histo in shown.items()} == {
        "hist/constant": 6,
        "hist/odd": 1,
        "hist/state": SAMPLE_SIZE,
    }
    assert min(shown["hist/state"].bucket[1:]) > 50  # of 64 in each


@pytest.mark.parametrize(("iterations", "drawn"), [(5, [1]), (30, [1, 11, 21]), (10_000, range(1, 10_001, 200))])
def test_histograms_at_a_low_rate(iterations: int, drawn: list[int] | range) -> None:
    assert [i for i in range(1, iterations + 1) if histograms_due(i, iterations)] == list(drawn)
