"""Both screens, over the events of a small run. Look at one: `python tests/unit/test_ops_display.py [| cat]`."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import msgspec
import pytest

from agl_ray.ops.display import PlainDisplay, make_display
from agl_ray.ops.events import (
    Done,
    Event,
    Failed,
    Notice,
    Phase,
    Progress,
    StepDone,
    Validation,
    event_from_dict,
    event_to_dict,
)
from agl_ray.ops.live_display import LiveDisplay
from agl_ray.ops.step_line import aligned, header, named
from agl_ray.ops.summary import make_summary

STEPS = 25


def call(expression: str) -> dict[str, object]:
    function = {"name": "calculator", "arguments": f'{{"expression": "{expression}"}}'}
    return {"id": "c1", "type": "function", "function": function}


def conversation(expression: str, answer: str, reward: float) -> dict[str, object]:
    messages = [
        {"role": "system", "content": "You are a calculator agent."},
        {"role": "user", "content": "what is forty-seven plus 385?"},
        {"role": "assistant", "content": None, "tool_calls": [call(expression)]},
        {"role": "tool", "content": answer},
        {"role": "assistant", "content": f"The answer is {answer}."},
    ]
    return {"messages": messages, "reward": reward}


def summary() -> dict[str, object]:
    example = {"input": {}, "before": conversation("47-385", "-338", 0.0)}
    example["after"] = conversation("47+385", "432", 1.0)
    return make_summary(
        before=[1.0] * 52 + [0.0] * 204,
        after=[1.0] * 247 + [0.0] * 9,
        attempts={"ok": 3700, "timeout": 2},
        seconds={
            "setup": 41,
            "sft": 97,
            "rollout": 110,
            "update": 36,
            "sync": 1.2,
            "validation": 9,
        },
        total_seconds=321.0,
        updates=STEPS,
        weight_versions=STEPS + 1,
        max_logprob_diff=4.2e-6,
        retokenized_tokens=0,
        seed=0,
        events=[
            "runner-0 died (SIGKILL); its 12 attempts were queued again, runner-2 took its place"
        ],
        examples=[example] * 3,
        run_folder="runs/quickstart-20261120-120000",
    )


def events(step_seconds: float = 0.0) -> Iterator[Event]:
    yield Phase("setup", "start")
    for done in range(5):
        yield Progress("engine", done, 5, "loading")
        time.sleep(step_seconds)
    yield Phase("setup", "end", 41.2)
    yield Phase("sft", "start")
    for done in range(0, 101, 10):
        yield Progress("skill", done, 100, f"loss {1.0 / (1 + done):.2f}")
        time.sleep(step_seconds)
    yield Phase("sft", "end", 97.0)
    yield Validation(0, 0.203, (0.158, 0.257), 256)
    for step in range(1, STEPS + 1):
        yield Phase("rollout", "start")
        for done in range(0, 128, 32):
            yield Progress(f"rollouts of step {step}", done, 128)
            time.sleep(step_seconds)
        yield Phase("rollout", "end", 3.1)
        yield Phase("update", "start")
        time.sleep(step_seconds)
        yield Phase("update", "end", 0.9)
        if step == 7:
            yield Notice("runner-0 died (SIGKILL); its 12 attempts were queued again")
        metrics = {
            "step": step,
            "reward": step / STEPS,
            "groups": 16,
            "zero_signal_groups": step // 4,
        }
        metrics |= {"tokens_of_batch": 4200, "max_token_age": 0, "sync_ms": 31.3}
        metrics |= {"max_logprob_diff": 3.1e-6, "seconds_rollout": 3.1, "seconds_update": 0.9}
        metrics |= {"engine_kl": 2e-12, "grad_norm": 0.0412, "entropy": 1.2341, "kl_old": 0.0}
        metrics |= {"clip_low_fraction": 0.01, "clip_high_fraction": 0.02}
        metrics |= {"failures": {"timeout": 2} if step == 9 else {}}
        yield StepDone(step, STEPS, metrics)
    yield Validation(STEPS, 0.965, (0.935, 0.981), 256)
    yield Done(summary())


def test_events_survive_json() -> None:
    for event in [*events(), Failed("it broke")]:
        again = event_from_dict(msgspec.json.decode(msgspec.json.encode(event_to_dict(event))))
        assert again == event
    told = event_to_dict(Notice("x", restarted="store"))
    assert told == {"kind": "notice", "text": "x", "restarted": "store"}


def plain() -> list[str]:
    stream = io.StringIO()
    with PlainDisplay(stream, "configs/quickstart.yaml", clock=lambda: 0.0) as display:
        for event in events():
            display.show(event)
    return stream.getvalue().splitlines()


def test_plain_lines_have_a_time_and_say_it_all() -> None:
    lines = plain()
    assert all(line[2] == ":" and line[5] == ":" for line in lines)
    text = "\n".join(lines)
    assert "set-up ..." in text
    assert "base model: done after 1 min 37 s" in text
    assert "validation before training: 0.203 (95 % CI 0.158 to 0.257, n = 256)" in text
    assert "step 9/25: reward 0.360, groups 14/16, tok/s 1.1k, stale 0, sync ms 31" in text
    health = "dlogp 3e-06, eng kl 2e-12, grad 0.041, entropy 1.234, kl old 0e+00, clip 0.010/0.020"
    assert f"{health}, rollout s 3.1, update s 0.9, failures timeout 2" in text
    assert "notice: runner-0 died" in text
    assert "\x1b" not in text
    assert text.isascii()


def test_plain_bars_are_a_line_each_ten_seconds() -> None:
    now = 0.0
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=lambda: now)
    for done in range(100):
        now = done * 1.0
        display.show(Progress("skill", done, 100, "loss 0.5"))
    said = stream.getvalue().splitlines()
    assert len(said) == 9
    assert said[0].endswith("skill: 10 % loss 0.5")


def test_the_closing_screen_is_in_both() -> None:
    stream = io.StringIO()
    with LiveDisplay(stream) as display:
        for event in events():
            display.show(event)
    for text in ("\n".join(plain()), stream.getvalue()):
        assert "0.203" in text
        assert "0.965" in text
        assert "calculator(expression='47+385')" in text
        assert "Try next:" in text
    assert "train configs/quickstart.yaml seed=1" in "\n".join(plain())
    assert "train runs/quickstart-20261120-120000/config.json seed=1" in stream.getvalue()


def test_the_groups_of_a_step_say_what_was_replaced_and_what_is_missing() -> None:
    row = {"reward": 0.5, "groups": 14, "zero_signal_groups": 0}
    refilled = {"groups_refilled": 30, "groups_short": 2}
    assert "groups 14/14," in f"{named(StepDone(1, 2, row))},"
    assert "groups 14/16+30," in f"{named(StepDone(1, 2, row | refilled))},"
    nothing = {"reward": None, "groups": 0, "groups_refilled": 64, "groups_short": 16}
    assert named(StepDone(1, 2, nothing)) == "step 1/2: groups 0/16+64, failures none"


def test_a_step_in_which_nothing_was_compared_shows_no_difference() -> None:
    row = {"reward": 0.5, "groups": 2, "tokens_current": 0, "max_logprob_diff_all": 0.7}
    assert "dlogp" not in named(StepDone(1, 2, row))
    place = header(120).index("dlogp") + len("dlogp") - 1
    assert aligned(StepDone(1, 2, row), 120)[place] == "-"


def test_a_narrow_screen_has_the_columns_that_fit() -> None:
    steps = [event for event in events() if isinstance(event, StepDone)]
    assert all(len(aligned(step, 80)) <= 80 for step in steps if step.step != 9)
    assert len(header(80)) <= 80
    assert "dlogp" in header(100)
    referred = StepDone(1, 2, {**steps[8].metrics, "kl_reference": 0.0123})
    assert ", kl ref 1e-02, " in named(referred)  # a log has room for it, a screen has not
    assert "kl ref" not in header(200)
    assert "eng kl" not in header(119)
    assert "eng kl" in header(120)
    assert all(len(aligned(step, 120)) <= 120 for step in steps)
    only_high = {"clip_high_fraction": 0.02}  # of a loss without a lower bound
    assert ", clip -/0.020, " in named(StepDone(1, 2, {"groups": 1, **only_high}))
    for width in (80, 120):
        assert aligned(steps[8], width).endswith("  timeout 2")
        assert header(width).index("failures") == aligned(steps[8], width).index("timeout 2")


def test_the_facts_of_a_controller_are_no_closing_screen() -> None:
    stream = io.StringIO()
    for display in (PlainDisplay(stream), LiveDisplay(stream)):
        display.show(Done({"ledger": {}}))
    assert stream.getvalue().strip() == ""


def test_the_screen_is_chosen_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_display(Terminal()), LiveDisplay)
    assert isinstance(make_display(io.StringIO()), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(Terminal()), PlainDisplay)


if __name__ == "__main__":
    with make_display(config_file="configs/quickstart.yaml") as screen:
        for each in events(0.05):
            screen.show(each)
