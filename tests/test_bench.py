"""The benchmarks: the simulation against closed forms, and every script at a tiny size, by what its JSON says."""

import contextlib
import importlib
import io
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import lasp
import lasp_kernels as kernels
from lasp.models import TNLConfig
from lasp.models.mixers import rotary

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))  # where the scripts find each other when they are started

import horizon_savings  # noqa: E402
from horizon_savings import Count, count  # noqa: E402
from simulator import (  # noqa: E402
    Clock,
    Link,
    Machine,
    Pass,
    Work,
    exchange_seconds,
    operator_seconds,
    training_seconds,
)


def _script(name, *arguments):
    """Run a script's main in this process; its JSON, and whatever it printed before."""
    if str(BENCH) not in sys.path:  # in a worker
        sys.path.append(str(BENCH))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(name).main([str(a) for a in arguments])
    *text, last = printed.getvalue().splitlines() or [""]
    return (json.loads(last) if last else None), "\n".join(text)


# ---- the simulation

# A message of 1,000 bytes: 3 + 1 us of the port, 2 us in flight.
LINK = Link(overhead=3e-6, bandwidth=1e9, latency=2e-6)
HOP = 6e-6
MACHINE = Machine(LINK, LINK)


def test_events_happen_in_the_order_of_their_times():
    clock, seen = Clock(), []
    for time in (3.0, 1.0, 2.0, 1.0):
        clock.at(time, lambda: seen.append(clock.now))
    assert clock.run() == 3.0
    assert seen == [1.0, 1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="past"):
        clock.at(2.0, print)


@pytest.mark.parametrize("schedule", ["ring", "pipeline", "all_gather", "serial"])
def test_two_ranks_make_one_hop_and_one_rank_none(schedule):
    assert exchange_seconds(schedule, 1, 1000, MACHINE) == 0
    assert exchange_seconds(schedule, 2, 1000, MACHINE) == pytest.approx(HOP)


@pytest.mark.parametrize("ranks", [3, 8, 17])
def test_a_ring_takes_a_hop_and_a_fold_for_each_rank_between(ranks):
    machine = Machine(LINK, LINK, setup=10e-6, fold=5e-9)
    seconds = exchange_seconds("ring", ranks, 1000, machine)
    assert seconds == pytest.approx(10e-6 + (ranks - 1) * HOP + (ranks - 2) * 5e-6)


@pytest.mark.parametrize("ranks", [2, 8, 17])
@pytest.mark.parametrize("blocks", [1, 4, 50])
def test_a_pipeline_fills_and_then_a_block_comes_each_time_that_a_port_is_free(ranks, blocks):
    port = 3e-6 + 1e-6 / blocks
    expected = (ranks - 1) * (port + 2e-6) + (blocks - 1) * port
    assert exchange_seconds("pipeline", ranks, 1000, MACHINE, blocks=blocks) == pytest.approx(expected)


def test_folds_slower_than_the_port_set_the_pace_of_a_pipeline():
    machine = Machine(LINK, LINK, fold=40e-9)  # 10 us a block of 250 bytes, more than the 3.25 us of the port
    expected = 2 * 5.25e-6 + 10e-6 + 3 * 10e-6
    assert exchange_seconds("pipeline", 3, 1000, machine, blocks=4) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [3, 8, 17])
def test_an_all_gather_takes_a_hop_for_each_other_rank_then_the_last_folds_most(ranks):
    machine = Machine(LINK, LINK, fold=5e-9)
    assert exchange_seconds("all_gather", ranks, 1000, machine) == pytest.approx((ranks - 1) * (HOP + 5e-6))


def test_the_links_between_nodes_set_the_pace_of_an_all_gather_but_not_of_a_ring():
    machine = Machine(LINK, Link(overhead=3e-6, bandwidth=1e8, latency=2e-6))  # 13 us of the port, 15 us a hop
    assert exchange_seconds("ring", 16, 1000, machine) == pytest.approx(14 * HOP + 15e-6)
    gather = exchange_seconds("all_gather", 16, 1000, machine)
    assert 15 * 13e-6 < gather < 15 * 15e-6 + HOP


@pytest.mark.parametrize("ranks", [2, 17])
def test_neighbours_exchange_in_one_hop_however_many_they_are(ranks):
    assert exchange_seconds("neighbour", ranks, 1000, MACHINE) == pytest.approx(HOP)


def test_one_after_the_other_in_both_passes():
    work = [Pass(after=1e-3), Pass(after=2e-3)]
    expected = 8 * 3e-3 + 2 * 7 * HOP
    assert operator_seconds("serial", 8, 1000, MACHINE, work) == pytest.approx(expected)


def test_work_beside_the_exchange_hides_it():
    hidden = operator_seconds("ring", 8, 1000, MACHINE, [Pass(1e-4, 1e-3, 1e-4)])
    assert hidden == pytest.approx(1.2e-3)
    exposed = operator_seconds("ring", 8, 1000, MACHINE, [Pass(1e-4, 0.0, 1e-4)])
    assert exposed == pytest.approx(2e-4 + 7 * HOP)


def test_the_second_pass_runs_down_the_ranks():
    # The last rank is the first to know its gradient's state, but the last to end its first pass.
    forward, backward = Pass(1e-4, 0.0, 1e-4), Pass(1e-4, 0.0, 1e-4)
    expected = 2 * (2e-4 + 7 * HOP)
    assert operator_seconds("ring", 8, 1000, MACHINE, [forward, backward]) == pytest.approx(expected)


WIRE = Machine(Link(0.0, 1e6), Link(0.0, 1e6))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_an_all_reduce_sends_all_but_one_part_twice(ranks):
    """8 MB at 1 MB/s; it goes on beside other work, and what waits for it waits for the rest."""
    alone = 2 * (ranks - 1) / ranks * 8.0
    assert training_seconds([Work(3.0, starts=0, waits=0)], ranks, 8e6, WIRE) == pytest.approx(3 + alone)
    beside = [Work(3.0, starts=0), Work(1.0), Work(1.0, waits=0)]
    assert training_seconds(beside, ranks, 8e6, WIRE) == pytest.approx(3 + max(2.0, alone))


@pytest.mark.parametrize("travels", [2.0, 9.0, 60.0])
def test_what_the_schemes_of_co2_py_wait_for(travels):
    """Rounds of four steps of 6 s; DDP sends beside its backward, two thirds of a step, and CO2 beside a round."""
    import co2

    expected = {
        "alone": 6.0,
        "DDP": 2 + max(4.0, travels),
        "LocalSGD": 6 + travels / 4,
        "CO2": max(6.0, travels / 4),
        "DiLoCo (torchft), delay 1": 6 + max(0.0, travels - 6) / 4,
        "DiLoCo (torchft), delay all but 1": 6 + max(0.0, travels - 18) / 4,
    }
    for scheme, seconds in expected.items():
        assert co2.simulated(scheme, 2, 1e6 * travels, 1e6, 6.0, 4) == pytest.approx(seconds), scheme


def test_the_script_reproduces_what_it_is_fitted_to_and_says_what_it_predicts(tmp_path):
    result, text = _script("simulate", "--max-ranks", 16, "--save", "--out", tmp_path)
    rows = result["rows"]
    assert {row["how"] for row in rows} == {"fitted", "predicted"}
    assert all(abs(row["error %"]) < 0.01 for row in rows if row["how"] == "fitted")
    assert all(abs(row["error %"]) < 30 for row in rows)
    assert [row["how"] for row in rows if row["figure"] == "operator, ZeCO"] == ["predicted"] * 3
    assert "fitted, AllGather" in text
    table, horizon = result["tables"].values()
    assert {row["ranks"] for row in table} == {8, 16}
    for row in horizon:
        assert (row["heads that go further"] > 0) == (row["decay"] == "alibi")
        assert row["heads that go further"] < row["of"]
        assert row["op ms, whole ring"] > row["op ms"]
    of = {(row["network"], row["schedule"], row["ranks"]): row["% of one rank"] for row in table}
    for network in {row["network"] for row in table}:
        assert of[network, "serial", 16] < 10 < of[network, "ring", 16] <= of[network, "pipeline", 16] < 100
    [plot] = tmp_path.glob("*_simulation.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


# A plain message of n bytes: 10 us and n / (100 GB/s). Three ranks: two steps of the all-gather.
SIZES = {64: 65536 / 100e9, 1024: 2**20 / 100e9}


def _measured_file(folder):
    def row(schedule, kib, microseconds, blocks=None):
        return {"schedule": schedule, "KiB": kib, "ms": microseconds / 1e3, "blocks": blocks}

    rows = []
    for kib, seconds in SIZES.items():
        hop = 10 + 1e6 * seconds
        rows += [row("plain send and receive", kib, hop), row("plain all-gather", kib, 2 * hop)]
        rows += [row("ring", kib, 4 * hop, 1), row("by_pigeon", kib, hop, 1), row("direct", kib, hop, 1)]
    operator = {"tokens a rank": 8192, "decay": "none", "direction": "backward", "ms": 2.0, "one rank ms": 1.0}
    network = (
        "Network(latency=2e-05, bandwidth=5e+10, collective_latency=2e-05, collective_bandwidth=5e+10, source='x', "
        "direct_latency=1e-05, direct_bandwidth=1e+11)"
    )
    result = {
        "command": "torchrun bench/exchange.py",
        "tables": {
            "the exchange alone": rows,
            "the operator": [operator | {"schedule": s, "chosen": s} for s in ("ring", "by_pigeon")],
        },
        "facts": {"ranks": 3, "network as lasp measured it": network},
    }
    path = folder / "2000-01-01_exchange_3xcuda.json"
    path.write_text(json.dumps(result))
    return path


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_direct_is_a_meeting_and_one_read_of_all_before(ranks):
    machine = replace(MACHINE, fold=5e-9)
    alone = exchange_seconds("direct", ranks, 1000, machine)
    link = machine.inside
    expected = link.overhead + (ranks - 1) * (1000 / link.bandwidth + 5e-6) if ranks > 1 else 0.0
    assert alone == pytest.approx(expected)
    late = operator_seconds("direct", ranks, 1000, machine, [Pass(1e-4, 1e-3, 1e-4)])
    assert late == pytest.approx(1.2e-3)  # hidden, but for what comes before and after


def test_measured_times_beside_simulated_ones(tmp_path):
    from simulate import FOLD

    path = _measured_file(tmp_path)
    result, text = _script("simulate", "--max-ranks", 8, "--measured", path, "--save", "--out", tmp_path)
    *_, alone, operator = result["tables"].values()
    assert [(row["schedule"], row["KiB"]) for row in alone] == [(s, n) for n in SIZES for s in ("ring", "direct")]
    for row, seconds in zip(alone[1::2], SIZES.values()):
        expected = 1e-5 + 2 * (seconds + FOLD * row["KiB"] * 1024)
        assert row["with lasp's network ms"] == pytest.approx(1e3 * expected, abs=1e-4)
        assert (row["simulated ms"], row["error %"]) == (None, None)  # no plain message does what it does
    for row, seconds in zip(alone[::2], SIZES.values()):
        hop, fold = 1e-5 + seconds, FOLD * row["KiB"] * 1024
        assert row["simulated ms"] == pytest.approx(1e3 * (2 * hop + fold), abs=1e-4)
        assert row["error %"] == pytest.approx(100 * ((2 * hop + fold) / (4 * hop) - 1), abs=0.1)
        assert row["with lasp's network ms"] == pytest.approx(1e3 * (4 * hop + fold), abs=1e-4)  # both parts are double
    [row] = operator
    assert (row["simulated ms"], row["error %"]) == (1.0, -50)  # dq hides the exchange
    assert "unknown to the simulator, 2000-01-01_exchange_3xcuda: by_pigeon" in text
    [kept] = tmp_path.glob("*_simulation.md")
    assert "the exchange alone, measured and simulated: 2000-01-01_exchange_3xcuda" in kept.read_text()


def test_scaling_beside_its_simulation(tmp_path):
    """Operators and a training step, by hand: what one rank takes, a meeting, and a read and a fold for each before."""
    from simulate import FOLD, LAYERS, OPERATOR_BYTES, kernel_seconds

    exchange = _measured_file(tmp_path)
    one = {"tokens a rank": 65536, "direction": "forward", "one rank ms": 8.0, "chosen": "direct"}
    weak = [{**one, "ranks": ranks, "decay": decay, "ms": 9.0} for ranks in (1, 3) for decay in ("none", "kda")]
    weak += [{**one, "ranks": 3, "decay": "none", "ms": 9.0, "direction": "both"}]
    strong = [{**one, "ranks": 2, "decay": "none", "ms": 5.0}]
    operators, steps = tmp_path / "operators.json", tmp_path / "steps.json"
    operators.write_text(json.dumps({"rows": [], "tables": {"weak scaling": weak, "strong scaling": strong}}))
    of_step = {"tokens a rank": 65536, "sequence": 65536}
    layouts = [{**of_step, "layout": f"1x{n}", "ranks": n, "step ms": 900.0 + n} for n in (1, 3)]
    steps.write_text(
        json.dumps(
            {
                "command": "bench/scaling.py --model 1B",
                "rows": [*layouts, {**of_step, "layout": "3x1", "ranks": 3, "step ms": 901.0}],
            }
        )
    )
    given = ("--max-ranks", 8, "--measured", exchange, "--scaling", operators, steps)
    *_, of_operators, of_steps = _script("simulate", *given)[0]["tables"].values()
    found = [(row["what"], row["ranks"], row["decay"]) for row in of_operators]
    assert found == [("weak", 3, "none"), ("weak", 3, "kda"), ("strong", 2, "none")]

    def more(reads, nbytes):  # the meeting, the reads, and a fold; as `_measured_file` has the network
        return 1e-5 + reads * (nbytes / 1e11 + FOLD * nbytes)

    for row, one_ms, seconds in zip(
        of_operators, (8, 8, 4), (more(2, OPERATOR_BYTES), more(2, 2 * OPERATOR_BYTES), more(1, OPERATOR_BYTES))
    ):
        assert row["with lasp's network ms"] == pytest.approx(one_ms + 1e3 * seconds, abs=1e-3)
    [step] = of_steps
    assert (step["what"], step["ranks"]) == ("step of TNL-1B, 1x3", 3)
    assert 901 < step["with lasp's network ms"] <= 901 + 2e3 * LAYERS * more(2, OPERATOR_BYTES)
    assert step["its error %"] == pytest.approx(100 * (step["with lasp's network ms"] / 903 - 1), abs=0.1)
    assert kernel_seconds(65536) > (0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read as a result"),
        ("", "cannot be read as a result"),
        ("[]", "is no result of a script"),
        ('{"tables": null}', "is no result of a script"),
        ('{"rows": null}', "has rows of another kind"),
        ('{"rows": [{"ranks": 2, "chosen": "direct", "direction": "forward"}]}', "has rows of another kind"),
        ('{"command": "--model 385M", "rows": [{"layout": "1x2", "step ms": 3.0}]}', "has no times of several ranks"),
    ],
)
def test_a_file_that_is_no_scaling_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "given.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=f"given.json {said}"):
        _script("simulate", "--max-ranks", 8, "--measured", _measured_file(tmp_path), "--scaling", path)


@pytest.mark.parametrize("given", [("--scaling", "x.json"), ("--measured", "own", "--scaling", "own")])
def test_scaling_without_a_network_or_without_ranks_is_refused(tmp_path, given, capsys):
    path = _measured_file(tmp_path)
    words = [path if word == "own" else word for word in given]
    with pytest.raises(SystemExit) as refused:
        _script("simulate", "--max-ranks", 8, *words)
    said = f"{refused.value} {capsys.readouterr().err}"
    assert "--scaling needs --measured" in said or "has no times of several ranks beside those of one" in said


def test_a_file_without_messages_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"other\.json has no times of suite `alone`"):
        _script("simulate", "--measured", path)


# ---- what the horizon saves


def test_count_of_hops_and_bytes():
    shape = {"heads": 2, "tokens": 100, "ranks": 8, "key_dim": 16, "value_dim": 32}
    state = 4 * 16 * 32
    assert count("ring", None, **shape) == Count(2, 7, 2 * state)
    assert count("ring", [-2.0, -0.5], **shape) == Count(1, 7, 2 * state)
    assert count("ring", [-2.0, -3.0], **shape) == Count(0, 1, 2 * state)
    assert count("all_gather", None, **shape).bytes_sent == 7 * 2 * (state + 4)
    assert count("all_gather", [-2.0, -0.5], **shape).bytes_sent == 7 * (state + 4) + state


def test_savings_of_the_published_schedules():
    """TNL's paper: the slowest head, 0.5 / 16 a token, has lost e^-104 of a state after 3,328 tokens. ALiBi: 2^-8."""
    sizes = {"heads": 16, "layers": 16, "dim": 8}
    assert "| 0 of 256 | 1,008 -> 16 |" in horizon_savings.row("tnl", 64, tokens=3329, **sizes)
    assert "| 1 of 256 |" in horizon_savings.row("tnl", 64, tokens=3327, **sizes)
    assert "| 1,008 -> 1,008 |" in horizon_savings.row("alibi", 64, tokens=16384, **sizes)
    assert horizon_savings.table().count("\n") == 9


# ---- what needs ranks


def _in_a_worker(function, *arguments):
    """A "tiny" model is smaller there: the scripts are looked at, and not how models learn. Nor is garbage collected,
    for which they look through all that was imported, before each measurement."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    with mock.patch.dict("lasp.models.sizes.SIZES", tiny=(2, 64, 2, 96)), mock.patch("gc.collect"):
        return function(*arguments)


def _on_ranks(world, name, *arguments):
    """A script's JSON, from rank 0; the other ranks print nothing."""
    (result, _), *others = run_ranks(world, _in_a_worker, _script, name, *map(str, arguments))
    assert [(json_line, text) for json_line, text in others] == [(None, "")] * (world - 1)
    return result


SMALL = ("--heads", 4, "--dim", 16, "--tokens", 64, "--repetitions", 2)


def test_exchange_alone_and_operator(tmp_path):
    result = _on_ranks(3, "exchange", "--suite", "alone", "op", "--bytes", 65536, *SMALL, "--save", "--out", tmp_path)
    assert all(row["relative error"] <= row["limit"] for row in result["rows"])
    alone, operator = result["tables"].values()
    assert {row["schedule"] for row in alone if row["predicted ms"]} == {"ring", "all_gather", "pipeline"}
    assert all(row["ms"] > 0 for row in alone)
    assert len(operator) == 2 * 2 * 5  # decays, directions, schedules
    for row in operator:
        # three numbers with four digits
        assert row["% of one rank"] == pytest.approx(100 * row["one rank ms"] / row["ms"], rel=2e-3)
        assert row["met"] is None  # the targets are for GPUs
    assert result["facts"]["ranks"] == 3
    assert (tmp_path / f"{result['environment']['date']}_exchange_3xcpu.md").exists()


def test_peers_are_right_on_two_ranks_and_who_cannot_run_says_why():
    result = _on_ranks(2, "exchange", "--suite", "peers", *SMALL)
    right = {row["what"] for row in result["rows"] if row["relative error"] <= row["limit"]}
    assert right == {"peer, lasp", "peer, lasp1_serial", "peer, ulysses", "peer, ring_softmax"}
    [rows] = result["tables"].values()
    of = {row["peer"]: row for row in rows}
    assert of["fla_cp"]["note"].startswith("not run: fla-core")
    assert of["fla_cp"]["both ms"] is None
    assert of["lasp"]["x lasp"] == 1
    assert all(row["both ms"] > 0 for name, row in of.items() if name != "fla_cp")


def _beside_fla(backward, factor, *arguments):
    """Suite `delta`, with our operator in place of fla's, whose o is off by a factor, and whose backward may refuse."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    import exchange
    import operators
    from peers import fla_context_parallel as fla

    def refuse(gradient):
        raise RuntimeError("Triton >= 3.4.0 and < 3.7.1 on Hopper")

    def call(x, decay, cp_context=None, cu_seqlens=None):
        assert (cp_context is None) != (cu_seqlens is None)
        o = factor * operators.call(x, decay, sequence=cp_context)
        if not backward:
            o.register_hook(refuse)
        return o

    with (
        mock.patch.object(fla.FlaContextParallel, "unavailable", return_value=None),
        mock.patch.object(fla, "cp_context", side_effect=lambda T, device, group, W: lasp.SequenceParallel(group)),
        mock.patch.object(fla, "call", side_effect=call),
        mock.patch.object(exchange, "compile_fla") as compiled,
    ):
        found = _script("exchange", "--suite", "delta", *SMALL, *arguments)
        assert compiled.call_count == 1
    return found


def _by_operator(found):
    [rows] = found["tables"].values()
    return {(row["operator"], row["decay"], row["direction"]): row for row in rows}


def test_the_delta_rule_beside_context_parallelism_of_fla():
    (found, _), _ = run_ranks(2, _beside_fla, True, 1.0)
    rows = _by_operator(found)
    decays, directions = ("delta", "gated_delta", "kda"), ("forward", "backward", "both")
    assert list(rows) == [(who, d, x) for d in decays for who in ("lasp", "fla_cp") for x in directions]
    for (who, _, _), row in rows.items():
        assert row["ms"] > 0
        assert row["% of one rank"] == pytest.approx(100 * row["one rank ms"] / row["ms"], rel=2e-3)
        assert (row["x lasp"] == 1) or who == "fla_cp"
        assert (row["note"], row["met"]) == (None, None)  # targets are for GPUs
    assert {gate["what"] for gate in found["rows"]} >= {"operator, auto, kda", "fla_cp, kda, backward"}
    assert all(gate["relative error"] <= gate["limit"] for gate in found["rows"])


def test_a_part_of_fla_that_refuses_or_is_wrong_is_told_and_not_timed():
    (found, _), _ = run_ranks(2, _beside_fla, False, 1.0, "--decay", "gated_delta")
    rows = _by_operator(found)
    assert rows["fla_cp", "gated_delta", "forward"]["ms"] > 0
    for direction in ("backward", "both"):
        row = rows["fla_cp", "gated_delta", direction]
        assert (row["ms"], row["note"]) == (None, "not run: RuntimeError: Triton >= 3.4.0 and < 3.7.1 on Hopper")
        assert rows["lasp", "gated_delta", direction]["ms"] > 0
    (found, _), _ = run_ranks(2, _beside_fla, True, 1.1, "--decay", "kda")
    wrong = _by_operator(found)["fla_cp", "kda", "forward"]
    assert (wrong["ms"], wrong["note"]) == (None, "not run: relative error 1.0e-01 is over 1e-05")
    alone = _by_operator(_on_ranks(2, "exchange", "--suite", "delta", *SMALL, "--decay", "kda"))
    assert alone["fla_cp", "kda", "both"]["note"].startswith("not run: fla-core's context parallelism needs NVIDIA")
    assert alone["lasp", "kda", "both"]["ms"] > 0


def test_settings_of_context_parallelism_are_compiled_as_each_of_two_ranks(monkeypatch):
    import exchange
    import fla_families
    import operators

    from lasp.ranks.collectives import gather_flat

    seen = []

    def call(x, decay, cp_context):
        gather_flat(torch.empty(2, 4), torch.ones(1, 4), group=cp_context)  # of nobody
        seen.append((decay, dist.get_rank(), dist.get_world_size()))
        return operators.call(x, decay)

    monkeypatch.setattr(exchange, "fla_call", call)
    monkeypatch.setattr(exchange, "cp_context", lambda T, device, group, ranks: group)
    monkeypatch.setattr(fla_families, "compile_part", lambda part, calls: [call() for call in calls])
    before = exchange.compile_part
    monkeypatch.setattr(exchange, "compile_part", lambda options, device: before(options, torch.device("cpu")))
    exchange.main(["--heads", "1", "--dim", "16", "--decay", "delta", "kda", "--compile-part", "0/2"])
    assert seen == [("gated_delta", 0, 2), ("gated_delta", 1, 2), ("kda", 0, 2), ("kda", 1, 2)]
    assert not dist.is_initialized()


def test_the_targets_of_the_delta_rule():
    from exchange import delta_row
    from timing import Time

    bench = SimpleNamespace(env=SimpleNamespace(device=torch.device("cuda")))
    time = {("lasp", "ranks"): Time(2, 2, 2), ("lasp", "one"): Time(1.9, 2, 2)}
    time |= {("fla_cp", "ranks"): Time(2.5, 2.5, 2.6), ("fla_cp", "one"): Time(2, 2, 2)}

    def row(who, tokens):
        found = delta_row(bench, {"operator": who, "direction": "forward", "tokens a rank": tokens}, [time], None)
        return found["% of one rank"], found["x lasp"], found["target"], found["met"]

    assert row("lasp", 32768) == (pytest.approx(95), 1, 90, True)
    assert row("fla_cp", 32768) == (pytest.approx(80), 1.25, 1.3, False)
    assert row("fla_cp", 8192)[2:] == (None, None)


def test_a_peer_is_left_out_where_the_heads_do_not_suffice():
    result = _on_ranks(3, "exchange", "--suite", "peers", *SMALL)  # 4 heads
    [rows] = result["tables"].values()
    of = {row["peer"]: row["note"] for row in rows}
    assert of["ulysses"] == "not run: 4 heads cannot be dealt out to 3 ranks"
    assert "not run" not in of["ring_softmax"]


def _with_a_broken_schedule():
    import exchange

    from lasp_kernels import fold

    with (
        mock.patch.object(exchange, "fold", lambda entering, state, log_decay: 1.01 * fold(entering, state, log_decay)),
        pytest.raises(SystemExit, match="nothing was timed"),
    ):
        exchange.main(["--suite", "alone", "--bytes", "65536", "--repetitions", "1"])


def test_nothing_is_timed_that_is_wrong():
    run_ranks(2, _in_a_worker, _with_a_broken_schedule)


def test_scaling_of_the_operator_and_of_its_peers(tmp_path):
    small = ("--heads", 4, "--dim", 16, "--repetitions", 2, "--weak", 64, "--strong", 256, "--peer-tokens", 64)
    result = _on_ranks(2, "operator_scaling", *small, "--peers", "--save", "--out", tmp_path)
    assert all(row["relative error"] <= row["limit"] for row in result["rows"])
    assert {row["what"] for row in result["rows"]} >= {"operator, 1 of 2 ranks, none", "peer, ulysses, 2 ranks"}
    weak, strong, peers = result["tables"].values()
    for rows in (weak, strong):
        assert len(rows) == 2 * 2 * 3  # decays, numbers of ranks, directions
        for row in rows:
            work = row["ranks"] if rows is weak else 1  # of what one rank does
            assert row["speed-up"] == pytest.approx(work * row["one rank ms"] / row["ms"], rel=2e-3)
            assert row["% of ideal"] == pytest.approx(100 * row["speed-up"] / row["ranks"], rel=2e-3)
            assert (row["% of ideal"] == 100) or row["ranks"] == 2
        for forward, backward, both in zip(rows[::3], rows[1::3], rows[2::3]):
            assert both["ms"] == pytest.approx(forward["ms"] + backward["ms"], rel=2e-3)
    assert {(row["ranks"], row["tokens a rank"]) for row in weak} == {(1, 64), (2, 64)}
    assert {(row["ranks"], row["tokens a rank"]) for row in strong} == {(1, 256), (2, 128)}
    assert {row["met"] for row in weak} == {None}  # the target is for GPUs
    assert {(row["ranks"], row["tokens a rank"]) for row in peers} == {(2, 64)}
    assert result["facts"]["inputs"] == "B1 H4 D16 float32"
    [plot] = tmp_path.glob("*_operator_scaling_2xcpu.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_scaling_of_the_delta_rule_beside_fla():
    small = ("--heads", 2, "--dim", 16, "--repetitions", 1, "--weak", 64, "--strong", 0, "--peer-tokens", 64)
    result = _on_ranks(2, "operator_scaling", *small, "--peers", "--decay", "gated_delta")
    rows = result["tables"]["the delta rule beside fla-core's context parallelism"]
    assert [(row["ranks"], row["operator"]) for row in rows] == [(2, "lasp")] * 3 + [(2, "fla_cp")] * 3
    assert all(row["note"].startswith("not run: fla-core") for row in rows[3:])


def test_ranks_that_are_left_out_wait():
    small = ("--heads", 2, "--dim", 16, "--repetitions", 1, "--weak", 64, "--strong", 0, "--decay", "fixed")
    result = _on_ranks(3, "operator_scaling", *small)
    weak, strong = result["tables"].values()
    assert [row["ranks"] for row in weak] == [1, 1, 1, 2, 2, 2]
    assert strong == []


def test_the_target_of_weak_scaling():
    from operator_scaling import judged

    assert judged({"% of ideal": 95.0}, 95.0)["met"] is True
    assert judged({"% of ideal": 94.9}, 95.0)["met"] is False
    assert judged({"% of ideal": 94.9}, None)["met"] is None


def _with_a_wrong_operator():
    import operator_scaling
    import operators

    def wrong(*arguments, **options):
        o, state = lasp.linear_attention(*arguments, **options)
        return 1.01 * o, state

    wrong_here = mock.Mock(wraps=lasp, linear_attention=wrong)
    with (
        mock.patch.object(operators, "lasp", wrong_here if dist.get_rank() == 1 else lasp),
        pytest.raises(SystemExit, match=r"2 of 3 ranks, fixed: .* nothing was timed"),
    ):
        operator_scaling.main(["--heads", "2", "--dim", "16"])


def test_an_operator_that_is_wrong_on_one_rank_ends_the_run_on_all():
    run_ranks(3, _in_a_worker, _with_a_wrong_operator)


# ---- training steps


def test_weak_scaling_of_a_tiny_model(tmp_path):
    common = ("--model", "tiny", "--vocab", 64, "--steps", 2, "--warmup", 1)
    result = _on_ranks(2, "scaling", *common, "--tokens", 128, "--html", "--out", tmp_path)
    alone, split = result["rows"]
    assert (alone["layout"], split["layout"], split["sequence"]) == ("1x1", "1x2", 256)
    assert split["% of ideal"] == pytest.approx(100 * split["tokens/s/GPU"] / alone["tokens/s/GPU"], rel=2e-3)
    assert split["exchange costs ms"] == pytest.approx(
        split["step ms"] - split["without exchange ms"],
        rel=1e-2,
        abs=1e-3 * split["step ms"],  # rounded to four digits
    )
    assert (split["peak GiB"], split["exposed NCCL ms"]) == (None, None)  # a CPU tells neither
    assert (split["peak GiB by rank"], split["exposed NCCL ms by rank"]) == (None, None)
    [page] = tmp_path.glob("*_scaling_weak_tiny_2xcpu.html")
    for lack in ("memory by rank", "time in which only NCCL&#x27;s kernels ran"):
        assert f"<li>{lack}: not measured on a CPU</li>" in page.read_text()
    [gate] = result["tables"].values()
    assert all(row["relative error"] < 1e-4 for row in gate)
    assert [row["what"] for row in gate] == ["loss, 1x2"]
    assert len(list(tmp_path.glob("*_scaling_weak_tiny_2xcpu.png"))) == 1


def test_strong_scaling_and_layouts():
    common = ("--model", "tiny", "--vocab", 64, "--steps", 1, "--warmup", 0)
    strong = _on_ranks(4, "scaling", *common, "--strong", 256, "--mesh", "2x2", "--chunk", 50)
    [row] = strong["rows"]
    assert (row["layout"], row["ranks"], row["tokens a rank"], row["% of ideal"]) == ("2x2", 4, 128, 100)
    assert all(row["relative error"] < 1e-4 for row in strong["tables"].popitem()[1])


def test_schemes_of_data_parallelism():
    common = ("--model", "tiny", "--vocab", 64, "--steps", 1, "--warmup", 0, "--tokens", 64, "--mesh", "2x1")
    rows = {row["scheme"]: row for row in _on_ranks(2, "scaling", *common, "--schemes")["rows"]}
    assert list(rows) == ["ddp", "ddp-legacy", "zero1", "zero2", "zero3", "hsdp", "co2"]
    assert all(row["relative error of losses"] < 1e-4 for row in rows.values())
    weights = rows["ddp-legacy"]["sent MiB"]  # 4 bytes of each of N weights: an all-reduce over two ranks
    for scheme, times in (("ddp", 1), ("zero1", 1.5), ("zero2", 1)):
        assert rows[scheme]["sent MiB"] == pytest.approx(times * weights, rel=0.05), scheme
    assert 1.3 * weights < rows["zero3"]["sent MiB"] < 1.5 * weights  # the rest of the model is gathered once
    assert rows["hsdp"]["sent MiB"] == pytest.approx(weights, rel=0.05)  # of two copies of one rank each
    assert rows["co2"]["sent MiB"] == pytest.approx(weights, rel=0.05)  # once a round, which is one step here


def test_layouts_with_tensor_parallelism(tmp_path):
    common = ("--model", "tiny", "--vocab", 64, "--steps", 1, "--warmup", 0, "--tokens", 128)
    found = _on_ranks(2, "scaling", *common, "--mesh", "1x1x2", "--save", "--out", tmp_path)
    alone, split = found["rows"]
    assert (alone["layout"], split["layout"], split["ranks"], split["sequence"]) == ("1x1", "1x1x2", 2, 128)
    assert split["tokens/s/GPU"] == pytest.approx(1e3 * 128 / split["step ms"] / 2, rel=1e-2)
    [gate] = found["tables"].values()
    assert [(row["what"], row["relative error"] < 1e-4) for row in gate] == [("loss, 1x1x2", True)]
    only = _on_ranks(2, "scaling", *common, "--mesh", "1x1x2", "--only")
    assert [row["layout"] for row in only["rows"]] == ["1x1x2"]
    assert not any(only["tables"].values())


def test_predicted_memory():
    """The number of parameters is that of the model, and what was measured is near."""
    import memory

    from lasp.models import TNL

    with torch.device("meta"):
        model = TNL(config := memory.config_of("1B"))
    angles = config.heads * (config.width // config.heads)
    assert memory.parameters(config) == sum(p.numel() for p in model.parameters()) - angles
    errors = [row.split("|")[7] for row in memory.against_measured().splitlines()[2:]]
    assert max(abs(int(x.strip().rstrip("%"))) for x in errors) <= 13
    whole, cut = (memory.peak_bytes(config, 65536, tp=tp) for tp in (1, 8))
    assert whole / 8 < cut < whole / 3  # the stream is on each rank
    assert memory.longest(config, whole, tp=1, shards=1) == 65536
    assert memory.longest(config, 1e9, tp=1, shards=1) == 0


# ---- trainings to the end

TINY = ("--ranks", 2, "--seq-len", 65, "--last", 3, "--data", BENCH.parent / "README.md")


def _train_cell(spec, last):
    if str(BENCH) not in sys.path:  # in a worker
        sys.path.append(str(BENCH))
    cells = importlib.import_module("cells")
    return cells.train(cells.Cell(**spec), last)


def _train_on_workers(cell, options):
    first, *others = run_ranks(cell.dp * cell.sp, _train_cell, asdict(cell), options.last)
    assert all(other["losses"] == first["losses"] for other in others)
    return first


@pytest.fixture
def trained(monkeypatch):
    """Cells train on this file's workers, not in processes that are started for each; the names of those that did."""
    cells, names = importlib.import_module("cells"), []

    def launch(cell, options):
        names.append(cell.name)
        return _train_on_workers(cell, options)

    monkeypatch.setattr(cells, "launch", launch)
    return names


def test_convergence_with_and_without_sequence_parallelism(trained, tmp_path):
    given = (*TINY, "--steps", 10, "--lr", 2e-3, "--kept", tmp_path / "kept.json", "--shape", 4, 32, 2, 48)
    given += ("--largest-gap", 1e-3)
    result, _ = _script("convergence", *given, "--models", "tnl", "--schemes", "ddp", "zero3")
    assert [(row["model"], row["scheme"]) for row in result["rows"]] == [("tnl", "ddp"), ("tnl", "zero3")]
    assert [row["published gap"] for row in result["rows"]] == [-0.004, -0.007]
    for row in result["rows"]:
        assert row["largest of a step"] < 1e-3
        assert row["with"] < 5.45  # of 5.55
    del trained[:]
    every = ("linear", "hybrid", "mamba2 of transformers")
    given += ("--models", "tnl", *every, "--schemes", "ddp", "--save", "--out", tmp_path)
    result, _ = _script("convergence", *given)
    assert trained == [f"{model}, ddp, {way}" for model in every for way in ("without", "with")]  # and no other again
    assert [row["model"] for row in result["rows"]] == ["tnl", *every]
    assert all(row["largest of a step"] < 1e-3 for row in result["rows"])
    assert result["facts"]["missing"] == []
    [curves] = result["tables"].values()
    assert len(curves) == 2 * 4
    assert list(curves[0]) == ["cell", *map(str, range(1, 11))]
    assert len(list(tmp_path.glob("*_convergence_2xcpu.png"))) == 1


@pytest.mark.parametrize("text", ['{"options": {}, "ce', "", "[]", '{"cells": {}}', None])
def test_a_file_of_results_that_is_none_is_refused(tmp_path, capsys, text):
    kept = tmp_path / "kept.json"
    kept.mkdir() if text is None else kept.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        _script("convergence", *TINY, "--kept", kept, "--steps", 2)
    said = capsys.readouterr().err
    assert "error: --kept: " in said
    assert "kept.json is not what a run kept (" in said


def test_results_of_other_options_are_refused(trained, tmp_path, capsys):
    kept = (*TINY, "--kept", tmp_path / "kept.json", "--shape", 1, 16, 1, 16, "--models", "tnl", "--schemes", "ddp")
    _script("convergence", *kept, "--steps", 2)
    with pytest.raises(SystemExit, match="2"):
        _script("convergence", *kept, "--steps", 3)
    assert "kept.json has results of other options (steps: 2 there, 3 now)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        _script("convergence", *kept[2:], "--ranks", 2, "--batch", 3, "--steps", 2)
    assert "--batch must be a multiple of --ranks 2, got 3" in capsys.readouterr().err


def test_a_gap_or_a_cell_that_failed_ends_with_1_and_the_cell_is_tried_again(tmp_path, monkeypatch, capsys):
    cells = importlib.import_module("cells")
    asked, broken = [], "linear, ddp, with"

    def launch(cell, options):
        asked.append(cell.name)
        if cell.name == broken:
            return None
        loss = 2.0 + 0.004 * (cell.sp > 1)
        return {"losses": [9.0] * 7 + [loss] * 3, "tokens/s": 1.0, "peak GiB": None}

    monkeypatch.setattr(cells, "launch", launch)
    given = (*TINY, "--steps", 10, "--kept", tmp_path / "kept.json", "--models", "tnl", "linear", "--schemes", "ddp")
    given += ("--save", "--out", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        _script("convergence", *given)
    [found] = tmp_path.glob("*_convergence_2xcpu.json")
    result = json.loads(found.read_text())
    assert result["facts"]["missing"] == [broken]
    assert [(row["model"], row["gap"]) for row in result["rows"]] == [("tnl", pytest.approx(0.004))]
    assert f"{broken} FAILED" in capsys.readouterr().err
    broken = None
    _script("convergence", *given)
    assert asked.count("linear, ddp, with") == 2
    assert len(asked) == 5
    with pytest.raises(SystemExit, match="1"):
        _script("convergence", *given, "--largest-gap", 0.003)
    assert len(asked) == 5
    with pytest.raises(SystemExit, match="no pair of cells is complete"):
        _script("convergence", *given, "--kept", tmp_path / "other.json", "--budget", 1e-9)


def test_runs_side_by_side_share_a_file(trained, tmp_path, capsys):
    """A cell that another run is at is left to it; what that has written meanwhile is kept."""
    import fcntl

    kept = (*TINY, "--kept", tmp_path / "kept.json", "--shape", 1, 16, 1, 16, "--models", "tnl", "--schemes", "ddp")
    with (tmp_path / ".kept.json.tnl, ddp, without.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="no pair of cells is complete; missing: tnl, ddp, without"):
            _script("convergence", *kept, "--steps", 2)
    assert trained == ["tnl, ddp, with"]
    _script("convergence", *kept, "--steps", 2)
    assert trained == ["tnl, ddp, with", "tnl, ddp, without"]
    assert set(json.loads((tmp_path / "kept.json").read_text())["cells"]) == set(trained)


def test_ablations_of_parts(trained, tmp_path):
    given = (*TINY, "--steps", 4, "--shape", 2, 32, 2, 48, "--kept", tmp_path / "kept.json")
    result, _ = _script("ablations", "parts", *given, "--save", "--out", tmp_path)
    rows = {row["what"]: row for row in result["rows"]}
    base, *others = rows.values()
    assert base["what"] == "TNL"
    assert len(others) == 10
    assert all(row["gap"] != 0 for row in others)  # each part does something
    assert rows["TNL, no gate"]["published gap"] == 0.015
    assert rows["LLaMA (softmax)"]["published gap"] == 0.114
    assert rows["RetNet"]["published gap"] is None
    parameters = base["parameters, millions"] - rows["TNL, no gate"]["parameters, millions"]
    assert parameters == pytest.approx(2 * 32 * 32 / 1e6)
    assert len(list(tmp_path.glob("*_ablations_parts_2xcpu.png"))) == 1


def test_what_is_off_in_an_ablation():
    cells = importlib.import_module("cells")
    common = {"name": "", "model": "tnl", "seq_len": 8, "batch": 1, "steps": 1, "lr": 1.0, "dtype": "float32"}
    built = {part: cells.build(cells.Cell(shape=(3, 16, 2, 16), part=part, **common), 64) for part in cells.PARTS}

    def decays(part):
        found = [block.attention.attention.log_decay(torch.device("cpu")) for block in built[part].blocks]
        return None if found[0] is None else torch.stack(found).tolist()

    def lrpe(part):
        return [block.attention.lrpe is not None for block in built[part].blocks]

    assert lrpe("") == [True, False, False]
    assert lrpe("decay only") == [False] * 3
    assert lrpe("LRPE only") == lrpe("LRPE and decay in all layers") == [True] * 3
    assert decays("LRPE only") is None
    assert decays("decay only") == decays("LRPE and decay in all layers") == decays("")
    assert decays("no temperature") == [decays("")[0]] * 3 != decays("")
    for part, norm in (("", "SimpleRMSNorm"), ("LayerNorm", "LayerNorm"), ("RMSNorm with weights", "RMSNorm")):
        model = built[part]
        of = [model.norm, *(layer.norm for block in model.blocks for layer in (block.attention, block.glu))]
        assert [type(module).__name__ for module in of] == [norm] * 7, part
    with pytest.raises(ValueError, match="part must be '' for model 'gla', got 'no gate'"):
        cells.build(cells.Cell(shape=(3, 16, 2, 16), part="no gate", **{**common, "model": "gla"}), 64)


def test_models_at_sizes_with_loss_and_recall(trained, tmp_path):
    given = ("--ranks", 2, "--seq-len", 128, "--recall-len", 64, "--keys", 4, "--last", 3, *TINY[-2:])
    given += ("--steps", 5, "--sizes", "tiny", "--batch", 1, "--kept", tmp_path / "kept.json")
    result, _ = _script("ablations", "sizes", *given, "--save", "--out", tmp_path)
    rows = result["rows"]
    assert [row["model"] for row in rows] == ["TNL", "HGRN2", "cosFormer2", "LLaMA (softmax)"]
    assert len(trained) == 8
    for row in rows:
        assert 0 <= row["recall accuracy"] <= 1
        assert row["loss"] < 5.5
        assert row["recall loss"] < 5
    # Four of D x D and three of D x 384 a layer, the head, and softmax's two products over half of the tokens.
    weights = 4 * (4 * 128 * 128 + 3 * 128 * 384) + 256 * 128
    assert rows[-1]["FLOP"] == 6 * (weights + 4 * 128 * 128) * 128 * 5
    assert rows[1]["FLOP"] == 6 * (weights + 4 * 128) * 128 * 5  # and the bounds of HGRN2's gates
    assert len(list(tmp_path.glob("*_ablations_sizes_2xcpu.png"))) == 1


def test_a_cell_of_recall_is_the_same_however_it_is_split():
    cell = {"name": "", "model": "tnl", "shape": (2, 32, 2, 48), "seq_len": 64, "batch": 4, "steps": 8, "lr": 1e-2}
    cell |= {"dtype": "float32", "task": "recall", "keys": 4, "data": str(BENCH / "README.md")}
    dealt, split = (run_ranks(2, _train_cell, {**cell, "dp": dp, "sp": 2 // dp}, 8)[0] for dp in (2, 1))
    assert dealt["losses"] == pytest.approx(split["losses"], abs=1e-4)
    assert dealt["accuracy"] == pytest.approx(split["accuracy"], abs=0.02)
    assert 0 < split["accuracy"] < 1
    assert split["losses"][0] > split["losses"][-1]


def test_a_cell_in_processes_of_its_own(tmp_path, monkeypatch, capfd):
    cells = importlib.import_module("cells")
    monkeypatch.chdir(tmp_path)
    options = SimpleNamespace(launch="", last=2)
    cell = cells.Cell("tiny", "tnl", (2, 32, 2, 48), 65, 2, 3, 1e-3, "float32", sp=2, data=str(BENCH / "README.md"))
    assert cells.launch(cell, options)["losses"] == _train_on_workers(cell, options)["losses"]
    assert list(Path("runs").iterdir()) == []
    options.launch = "env WORLD_SIZE=1 RANK=0"
    assert cells.launch(cell, options) is None
    assert "cell 'tiny' is of 1 x 2 ranks, and there are 1" in capfd.readouterr().err


def test_time_that_computation_covers_is_not_exposed():
    from intervals import union
    from scaling import exposed, fitting_tokens

    kernels = {
        "ncclDevKernel_SendRecv(args)": [(0.0, 1000.0), (5000.0, 6000.0)],
        "ncclDevKernel_AllGather_RING_LL(args)": [(2000.0, 3000.0)],
        "matmul": [(500.0, 2500.0), (2200.0, 2400.0)],
    }
    assert exposed(kernels) == {"SendRecv": pytest.approx(1.5), "AllGather_RING_LL": pytest.approx(0.5)}
    assert union([(3, 4), (0, 2), (1, 3)]) == [(0, 4)]
    rows = [{"tokens a rank": 100, "peak GiB": 3.0}, {"tokens a rank": 200, "peak GiB": 5.0}]
    assert fitting_tokens(rows, 9.0) == pytest.approx(400)


def test_a_step_is_timed_from_the_end_of_the_one_before_and_nothing_waits_between():
    import scaling

    now, lasts = [0.0], iter((9.0, 9.0, 3.0, 1.0, 2.0))  # two of warm-up
    training = SimpleNamespace(device=torch.device("cpu"))
    training.step = mock.Mock(side_effect=lambda batch: now.append(now[-1] + next(lasts)))
    with (
        mock.patch.object(scaling, "dist") as ranks,  # one
        mock.patch.object(scaling, "mark", side_effect=lambda device: now[-1]),
    ):
        ranks.barrier.side_effect = lambda: now.append(now[-1] + 100.0)
        seconds, peak = scaling.steps(training, {}, SimpleNamespace(warmup=2, steps=3))
    assert training.step.call_count == 5
    assert ranks.barrier.call_count == 2
    assert seconds == 2.0
    assert peak is None


# ---- LASP's own ablation

TINY_STEPS = ("--model", "tiny", "--vocab", 64, "--steps", 1, "--warmup", 1)


def test_fusion_and_state_cache_on_and_off(tmp_path):
    common = ("--suite", "ablation", "--tokens", 128, *TINY_STEPS)
    found = _on_ranks(2, "lasp_ablation", *common, "--save", "--out", tmp_path)
    [rows] = found["tables"].values()
    assert [(row["fusion"], row["state cache"]) for row in rows] == [
        (fusion, cache) for fusion in ("on", "attention off", "off") for cache in ("on", "off")
    ]
    # Without a cache the state travels once more, in backward.
    assert [row["exchanges of a layer"] for row in rows] == [2, 3] * 3
    assert all(row["tokens/s"] == pytest.approx(256e3 / row["step ms"], rel=2e-3) for row in rows)
    assert rows[-1]["x neither"] == 1
    assert [row["right"] for row in found["rows"]] == [True] * 6
    assert len(list(tmp_path.glob("*_lasp_ablation_tiny_2xcpu.md"))) == 1


def _longest_with_memory(sizes, *arguments):
    """The script, where a device has so many GiB and a step takes the next of the sizes."""
    import lasp_ablation

    peaks = iter(sizes)
    with (
        mock.patch.object(lasp_ablation, "peak_gib", side_effect=lambda device: next(peaks)),
        mock.patch.object(lasp_ablation, "capacity_of", return_value=10.0),
    ):
        return _script("lasp_ablation", "--suite", "longest", "--lengths", 128, 256, "--short", 64, 128, *arguments)


def _longest(world, sizes, *arguments):
    """Its rows by method, and the whole."""
    (found, _), *_ = run_ranks(world, _in_a_worker, _longest_with_memory, sizes, *map(str, arguments))
    return {row["method"]: row for row in found["tables"]["the longest sequence"]}, found


def test_the_longest_sequence_of_each_method_is_run():
    common = (*TINY_STEPS, "--fill", 0.9)
    # Each a line of 1 GiB and 2 GiB for 128 tokens, of softmax for 64: 512 and 256 tokens fill 9 GiB.
    rows, found = _longest(2, [3.0, 5.0, 8.75] * 3 + [3.0, 5.0, 8.75] * 2, *common)
    assert list(rows) == ["lasp", "ulysses", "megatron", "ulysses_softmax", "ring_softmax"]
    assert {row["by"] for row in rows.values()} == {"run"}
    assert [row["tokens a rank"] for row in rows.values()] == [512] * 3 + [256] * 2
    assert all(row["sequence"] == 2 * row["tokens a rank"] for row in rows.values())
    assert {row["peak GiB"] for row in rows.values()} == {8.75}
    assert rows["lasp"]["GiB at"] == "128: 3, 256: 5"
    assert [row["right"] for row in found["rows"]] == [True] * 5
    assert all(row["of gradients"] < 1e-5 for row in found["rows"])
    assert found["tables"]["published: what 64 A100 80GB held"][0]["longest"] == "2048K"


def test_a_longest_sequence_that_takes_too_long_is_predicted_and_what_does_not_fit_says_so():
    common = (*TINY_STEPS, "--fill", 0.9, "--proof", 0, "--methods", "lasp", "ulysses", "megatron")
    rows, _ = _longest(2, [3.0, 5.0, 5.0, 12.0, 5.0, 5.0], *common)
    assert (rows["lasp"]["by"], rows["lasp"]["tokens a rank"], rows["lasp"]["peak GiB"]) == ("predicted", 512, 9.0)
    assert (rows["ulysses"]["by"], rows["ulysses"]["tokens a rank"], rows["ulysses"]["peak GiB"]) == ("run", 256, 12.0)
    assert rows["ulysses"]["note"] == "the lengths tried are as long as fits: give shorter ones"
    assert rows["megatron"]["note"].startswith("not found: memory does not grow")
    rows, _ = _longest(2, [], *TINY_STEPS, "--budget", 0, "--methods", "lasp")
    assert rows["lasp"]["note"] == "not run: no time left"


def _with_sequences_cut_apart():
    import lasp_ablation
    from sequence_methods import Method

    printed = io.StringIO()
    with (
        mock.patch.object(lasp_ablation, "METHODS", (Method("lasp", "without an exchange"),)),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit, match="what is wrong was not measured"),
    ):
        lasp_ablation.main([str(x) for x in ("--suite", "longest", "--methods", "lasp", *TINY_STEPS)])
    return printed.getvalue()


def test_a_method_that_is_wrong_is_not_measured():
    told, _ = run_ranks(2, _in_a_worker, _with_sequences_cut_apart)
    found = json.loads(told.splitlines()[-1])
    [gate], [row] = found["rows"], found["tables"]["the longest sequence"]
    assert not gate["right"]
    assert gate["of gradients"] > 0.1
    assert (row["note"], row["sequence"]) == ("not run: wrong", None)


def _out_of_memory():
    import lasp_ablation

    def one_step(training, tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    printed = io.StringIO()
    with (
        mock.patch.object(lasp_ablation, "one_step", one_step),
        mock.patch.object(lasp_ablation, "GRACE", 0),
        mock.patch.object(lasp_ablation.os, "_exit", side_effect=SystemExit) as ends,
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit),
    ):
        lasp_ablation.main([str(x) for x in ("--suite", "longest", "--methods", "lasp", *TINY_STEPS)])
    assert ends.call_args == mock.call(1)
    return printed.getvalue()


def test_what_was_measured_is_told_when_memory_runs_out():
    told, _ = run_ranks(2, _in_a_worker, _out_of_memory)
    [row] = json.loads(told.splitlines()[-1])["tables"]["the longest sequence"]
    assert row["note"] == "ran out of memory, which ended the run"


def test_seconds_of_a_step_that_grows_with_the_square():
    from lasp_ablation import seconds_at

    tried = [{"tokens a rank": n, "step s": 0.1 * n + 0.01 * n * n} for n in (4, 8)]
    assert seconds_at(20, tried) == pytest.approx(2 + 4)
    flat = [{"tokens a rank": n, "step s": 1.0} for n in (4, 8)]  # as where the host is the slowest
    assert seconds_at(16, flat) == pytest.approx(2.0)


# ---- kernels.py, without a card


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """The script, with a session whose peer is our own reference, and times that are made up."""
    import kernels

    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(kernels, "loop_milliseconds", lambda run: run() and 1.0)
    monkeypatch.setitem(kernels.ATTENTIONS, "fla", kernels.oracle)
    session = kernels.Session(budget=1e9, rep=6, peer_limit=60.0, peers={"fla"}, limits={"copy GB/s": 1e-3})
    return kernels, session


def test_the_least_of_several_rounds_counts(kernels_on_cpu, monkeypatch):
    kernels, session = kernels_on_cpu
    times = iter([0.25 * (1 + (n * 7) % 5) for n in range(1000)])  # 0.25, 0.75, 1.25, 0.5, 1, 0.25, ...
    monkeypatch.setattr(kernels, "milliseconds", lambda run, rep: (run(), next(times))[1])
    monkeypatch.setattr(kernels, "card_milliseconds", lambda run, rep: (run(), 0.5)[1])
    session.time("grid", kernels.Case(1, 64, 2, 16, "fixed"), ("lasp", "fla"))
    assert (session.failed, session.left_out) == ([], [])
    assert [row["what"] for row in session.rows] == ["lasp", "fla"]
    for row in session.rows:  # 6 rounds of 3 measurements see every time
        assert (row["fwd ms"], row["bwd ms"], row["both ms"], row["fwd card ms"]) == (0.25, 0.25, 0.25, 0.5)
        assert row["fwd % floor"] == pytest.approx(4 * 100 * 64 * 2 * 16 * 2 / 1e-3 / 1e6 / 0.25, rel=1e-3)
    ours = session.rows[0]
    assert (ours["fwd x fla"], ours["both card x fla"], session.rows[1]["fwd x fla"]) == (1.0, 1.0, None)
    assert kernels.verdicts(session.rows)["slower than fla"] == []


def test_inputs_that_do_not_fit_are_a_row_that_failed(kernels_on_cpu, monkeypatch):
    kernels, session = kernels_on_cpu

    def full(case):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels.Inputs, "random", full)
    session.time("grid", kernels.Case(1, 64, 2, 16, "none"), ("lasp",))
    assert session.rows == []
    assert len(session.failed) == 1
    assert "T64" in session.failed[0]
    assert "out of memory" in session.failed[0]


def test_only_short_calls_are_captured(kernels_on_cpu, monkeypatch):
    kernels, session = kernels_on_cpu
    times = iter([1.0, 3.0, 4.0] * kernels.ROUNDS)  # ms of forward, backward and both
    monkeypatch.setattr(kernels, "milliseconds", lambda run, rep: (run(), next(times))[1])
    monkeypatch.setattr(kernels, "card_milliseconds", lambda run, rep: 0.5)
    session.time("grid", kernels.Case(1, 64, 2, 16, "none"), ("lasp",))
    [row] = session.rows
    assert (row["fwd card ms"], row["both card ms"]) == (0.5, None)


@pytest.mark.parametrize("broken", ["lasp", "fla"])
def test_a_row_that_fails_is_told_and_leaves_the_others(kernels_on_cpu, monkeypatch, broken):
    kernels, session = kernels_on_cpu
    rounds = []

    def milliseconds(run, rep):
        rounds.append(run())
        if len(rounds) == (7 if broken == "lasp" else 10):  # in the second round
            raise RuntimeError("out of order")
        return 1.0

    def no_graph(run, rep):
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(kernels, "milliseconds", milliseconds)
    monkeypatch.setattr(kernels, "card_milliseconds", no_graph)
    session.time("grid", kernels.Case(1, 64, 2, 16, "none"), ("lasp", "fla"))
    [row] = session.rows
    assert row["what"] == ("fla" if broken == "lasp" else "lasp")
    assert row["fwd card ms"] is None
    told = session.failed if broken == "lasp" else session.left_out
    assert any("out of order" in text for text in told)
    assert any("cannot be captured" in text for text in session.left_out)
    assert (("fla", "none", 16) in session.dropped) == (broken == "fla")


def test_errors_of_the_delta_rule(monkeypatch):
    """Of this device's path; the times need a GPU."""
    monkeypatch.delenv("LASP_KERNELS", raising=False)
    delta = importlib.import_module("delta")
    for form in delta.FORMS:
        row = delta.errors(70, 1, 16, 8, form, torch.float32, 1.0, "cpu")
        assert row["path"] == "reference"
        assert (row["dg"] is None) == (form == "none")
        assert all(0 < row[name] < 1e-5 for name in delta.NAMES if row[name] is not None)
        assert delta.same_bits(600, form, "cpu")


def test_peers_of_the_delta_rule_get_what_ours_gets(monkeypatch):
    """Other packages' functions by our reference, with their names and shapes for arguments."""
    import delta_peers
    import fla_families

    delta = importlib.import_module("delta")

    def alike(q, k, v, g, beta, scale):  # also FlashQLA's
        return lasp.delta_rule(q, k, v, beta, log_decay=g, scale=scale)

    def packed(q, k, v, g, beta, ends, scale):
        assert (q.ndim, ends.dtype, ends.tolist(), beta.dtype) == (3, torch.int32, [0, len(q)], torch.float32)
        o, final = alike(*(x[None].to(g.dtype) for x in (q, k, v, g, beta)), scale)
        return o[0].to(q.dtype), final

    def fla(q, k, v, beta, scale, g=None):
        return alike(q, k, v, g, beta, scale)

    monkeypatch.setitem(sys.modules, "flash_qla", SimpleNamespace(chunk_gated_delta_rule=alike))
    cudnn = SimpleNamespace(gated_delta_net=packed, kimi_delta_attention=packed)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(linear_attention=cudnn))
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    names = {"chunk_delta_rule": fla, "chunk_gated_delta_rule": fla, "chunk_kda": fla}
    monkeypatch.setattr(fla_families, "fla", lambda file, name: names[name])
    for name, forms in delta_peers.FORMS.items():
        for form in forms:
            row = delta.compared(name, form, 16, 70, 2, "cpu")
            assert (row["path"], row["note"]) == (name, None)
            assert delta.right(row, ("o", *delta.GRADIENTS[form]))
            assert row["final"] is row["ds"] is None


def test_a_peer_of_the_delta_rule_that_is_wrong_or_refuses_is_told_and_not_timed(monkeypatch):
    delta = importlib.import_module("delta")

    def of(call):
        monkeypatch.setattr(delta, "peer", lambda name, form: call)
        return delta.compared("cudnn", "token", 16, 70, 2, "cpu")

    wrong = of(lambda x: delta.ours(x)[0] * 1.1)
    assert wrong["note"].startswith("o is 1.0e-01 off, dq is 1.0e-01 off")
    assert delta.times(70, 16, "token", "cudnn", 1.0, wrong)["note"] == wrong["note"]

    def refuse(gradient):
        raise NotImplementedError("engine " * 100 + "no backward here")

    def forward_only(x):
        o = delta.ours(x)[0]
        o.register_hook(refuse)
        return o

    half = of(forward_only)
    assert half["note"].startswith("NotImplementedError: ... ")
    assert half["note"].endswith("no backward here")
    assert delta.right(half, ("o",))
    assert not delta.right(half, delta.GRADIENTS["token"])
    assert not delta.right(half | {"o": float("nan")}, ("o",))

    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_qla", None)  # as where it is not installed
    missing = delta.compared("flashqla", "token", 16, 70, 2, "cpu")
    assert missing["note"].startswith("ModuleNotFoundError")
    row = delta.times(70, 16, "token", "flashqla", 1.0, missing)
    assert (row["fwd ms"], row["bwd ms"], row["note"]) == (None, None, missing["note"])


def test_a_process_beside_makes_its_part_of_the_settings_and_tells_what_fails(monkeypatch, capsys):
    import fla_families

    tuner = SimpleNamespace(prune_configs=lambda *_: list("abcde"), do_bench=None)
    monkeypatch.setattr(fla_families, "_tuners", lambda: [tuner])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seen = []

    def refused():
        raise RuntimeError("not on this card")

    fla_families.compile_part("1/2", [refused, lambda: seen.append(tuner.prune_configs())])
    assert seen == [["b", "d", "a"]]
    assert "RuntimeError: not on this card" in capsys.readouterr().err

    parts = {}
    monkeypatch.setattr(fla_families, "compile_part", lambda part, calls: parts.update({part: len(calls)}))
    importlib.import_module("delta").main(["--dims", "64", "32", "--compile-part", "0/4"])
    importlib.import_module("channel").main(["--compile-part", "3/4"])
    importlib.import_module("families").main(["--families", "gla", "kda", "hgrn2", "--compile-part", "2/4"])
    assert parts == {"0/4": 6, "3/4": 2, "2/4": 3}


def test_errors_of_a_decay_per_channel(monkeypatch):
    """Of this device's path; the times need a GPU."""
    monkeypatch.delenv("LASP_KERNELS", raising=False)
    channel = importlib.import_module("channel")
    for kind in channel.DECAYS:
        row = channel.errors(70, 1, 16, 8, kind, torch.float32, "cpu")
        assert row["path"] == "reference"
        assert all(0 < row[name] < 1e-5 for name in channel.NAMES)
    assert channel.same_bits(600, "cpu")


def test_settings_of_a_decay_per_channel():
    """They hold within, and no longer."""
    channel = importlib.import_module("channel")
    before = channel.plan.CONFIGS["channel finish"]
    with channel.finishing(16, 3):
        assert channel.plan.CONFIGS["channel finish"] == (channel.plan.Config(1, 0, 16, 1, 3),) * 4
    assert channel.plan.CONFIGS["channel finish"] == before


# ---- families.py, on a CPU


@pytest.fixture
def families(monkeypatch):
    found = importlib.import_module("families")
    monkeypatch.setattr(found, "GATE_TOKENS", 67)
    return found


def test_families_at_a_tiny_size(families, tmp_path):
    size = ("--size", "tiny", "--lengths", 48, "--layers", 1, "--vocab", 300)
    result, _ = _script("families", "--families", "gla", "delta_net", *size, "--save", "--out", tmp_path)
    assert [(row["family"], row["operator"]) for row in result["rows"]] == [
        ("gla", "LightningAttention"),
        ("delta_net", "DeltaRule"),
    ]
    for row in result["rows"]:
        assert row["error"] < 1e-5
        assert row["tokens/s"] == pytest.approx(48e3 / (row["fwd ms"] + row["bwd ms"]), rel=1e-2)
        assert (row["fwd % floor"], row["peak MiB"], row["fla"]) == (None, None, None)  # a CPU tells none of these
    [steps] = result["tables"].values()
    assert [row["family"] for row in steps] == ["gla", "delta_net"]
    assert all(row["tokens/s"] == pytest.approx(48e3 / row["step ms"], rel=1e-2) for row in steps)
    assert result["facts"]["left out"] == []
    [plot] = tmp_path.glob("*_families_tiny_1xcpu.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_training_steps_with_experts(families, tmp_path):
    size = ("--size", "tiny", "--lengths", 48, "--layers", 1, "--vocab", 300, "--no-operators", "--experts", 8)
    result, _ = _script("families", "--families", "gla", *size, "--save", "--out", tmp_path)
    assert [(row["family"], row["experts"]) for row in result["rows"]] == [("gla", 8)]
    assert len(list(tmp_path.glob("*_families_tiny_experts-8_1xcpu.png"))) == 1


def test_published_figures_beside_ours(families, tmp_path):
    small = ("--shapes", "1x2x16", "--lengths", 32, 64, "--gla", 2, 128, "--gla-lengths", 48)
    result, _ = _script("families", "--published", *small, "--save", "--out", tmp_path)
    assert [(row["T"], row["what"]) for row in result["rows"]] == [
        (T, what) for T in (32, 64) for what in ("lasp", "flash", "scores")
    ]
    gated, theirs = result["tables"].values()
    assert [row["what"] for row in gated] == ["lasp", "flash"]
    for ours, flash in ((gated[0], gated[1]), (result["rows"][0], result["rows"][1])):
        assert ours["fwd x flash"] == pytest.approx(flash["fwd ms"] / ours["fwd ms"], rel=1e-2)
        assert flash["fwd x flash"] is None
    assert [row["tokens"] for row in theirs] == [2**n for n in range(10, 16)]
    assert theirs[-1]["fwd_lightning"] == 6.380953
    assert len(list(tmp_path.glob("*_families_published_1xcpu.png"))) == 1


def test_every_family_gives_its_operator_what_it_can_be_timed_with(families):
    from lasp.models import DecoderConfig
    from lasp.models.mixers import MIXERS

    for family in MIXERS:
        made = families.operation(family, DecoderConfig.named(family, "tiny"), 20, torch.device("cpu"))
        assert families.error_of(made) < 1e-4, family
        assert made.call().shape[:2] == (1, 20)


def test_peers_get_what_our_operators_get(families, monkeypatch):
    """fla's functions by our reference, with its names for arguments: each family's peer computes the same."""
    import fla_families

    from lasp.models import DecoderConfig

    def simple(q, k, v, scale, g=None, g_gamma=None):
        return lasp.linear_attention(q, k, v, scale=scale, log_decay=g_gamma if g is None else g)

    def delta(q, k, v, beta, scale, g=None):
        return lasp.delta_rule(q, k, v, beta, log_decay=g, scale=scale)

    functions = {
        "chunk_simple_gla": simple,
        "chunk_gla": lambda q, k, v, g, scale: simple(q, k, v, scale, g),
        "chunk_delta_rule": delta,
        "chunk_gated_delta_rule": delta,
        "chunk_kda": delta,
    }
    monkeypatch.setattr(fla_families, "fla", lambda file, name: functions[name])
    names = {
        "softmax": "sdpa flash",
        "retnet": "chunk_simple_gla",
        "mamba2": "chunk_simple_gla",
        "gla": "chunk_gla",
        "hgrn2": "chunk_gla",
        "delta_net": "chunk_delta_rule",
        "gated_delta_net": "chunk_gated_delta_rule",
        "kda": "chunk_kda",
        "transnormer": "chunk_simple_gla",
        "cosformer2": "chunk_simple_gla",
    }
    for family, name in names.items():
        made = families.operation(family, DecoderConfig.named(family, "tiny"), 40, torch.device("cpu"))
        beside = fla_families.peer_of(made.module, made.given)
        assert beside.name == name
        assert families.error_of_peer(made, beside) < 1e-4, family


def test_what_is_wrong_or_fails_is_told_and_not_timed(families, monkeypatch):
    from lasp.modules import LightningAttention

    def half_wrong(self, q, k, v, log_decay=None, *, layout=None):
        if q.shape[1] == 64:
            raise RuntimeError("out of order")
        return lasp.linear_attention(q, k, v, log_decay=log_decay)[0] * (1.1 if q.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(LightningAttention, "forward", half_wrong)
    size = ("--size", "tiny", "--no-steps", "--lengths", 48, 64)
    with pytest.raises(SystemExit, match=r"nothing was measured: gla: 1\.0e-01 off, not timed"):
        _script("families", "--families", "gla", *size)
    monkeypatch.setattr(families, "GATE_LIMIT", 0.2)
    result, _ = _script("families", "--families", "gla", *size)
    assert [row["T"] for row in result["rows"]] == [48]
    assert result["facts"]["left out"] == ["gla T64: RuntimeError: out of order"]
    with pytest.raises(SystemExit, match="gla, gate: out of time"):
        _script("families", "--families", "gla", *size, "--budget", 0)


def test_errors_of_a_scan():
    scan = importlib.import_module("scan")
    for operator in scan.OPERATORS:
        row = scan.errors(operator, 70, "fp32", "cpu")
        assert all(0 < row[name] < 1e-5 for name in row if name not in ("operator", "T", "dtype"))


# ---- decoding

SMALL_DECODE = ("--models", "tiny", "--vocab-size", 50, "--heads", 2, "--dim", 16, "--layers", 2, "--no-fla")
SMALL_DECODE += ("--dtype", "float32", "--rep", 1)


def test_decode_steps_and_tokens(tmp_path):
    given = ("--phases", "step", "token", "--batch", 1, 3, 5, "--hows", "eager", "few rows")
    result, _ = _script("decode", *given, "--save", "--out", tmp_path, *SMALL_DECODE)
    steps = [(form, B, "lasp") for form in ("fixed", "none", "token", "channel", "delta") for B in (1, 3, 5)]
    assert [(row["decay"], row["B"], row["kernels"]) for row in result["rows"]] == steps
    assert all(row["error"] < 1e-2 and row["graph us"] > 0 and row["note"] is None for row in result["rows"])
    tokens = result["tables"]["token"]
    assert [(row["B"], row["how"]) for row in tokens] == [(1, "eager"), (1, "few rows"), (3, "eager"), (5, "eager")]
    for row in tokens:
        assert row["error"] < 1e-5
        assert row["GB of weights"] == pytest.approx(4 * (4 * (5 * 128**2 + 3 * 128 * 384) + 128 + 50 * 128) / 1e9)
        assert row["MB of states"] == pytest.approx(row["B"] * 4 * 5 * 4 * 32**2 / 1e6)  # twice in the first layer
    assert [row["tokens/s"] for row in result["tables"]["published, tokens/s"]] == [2819.6, 538.0, 967.2, 252.1]
    assert len(list(tmp_path.glob("*_decode.md"))) == 1


def test_decode_linear_layers():
    result, _ = _script("decode", "--phases", "linears", "--batch", 1, 3, *SMALL_DECODE)
    names = ["q k v gate", "out", "value gate", "glu out", "head"]
    expected = [(name, B, "PyTorch") for B in (1, 3) for name in names]
    assert [(row["layers"], row["B"], row["how"]) for row in result["rows"]] == expected
    assert all(row["error"] < 1e-5 and row["GB/s"] > 0 for row in result["rows"])


def test_decode_leaves_out_what_is_wrong_or_too_long(monkeypatch):
    decode, step = importlib.import_module("decode"), kernels.linear_attention_step
    monkeypatch.setattr(kernels, "linear_attention_step", lambda *args, **options: 100 + step(*args, **options))
    given = ("--phases", "step", "token", "--decays", "none", "--batch", 1, "--hows", "eager")
    result, _ = _script("decode", *given, *SMALL_DECODE)
    for row in (*result["rows"], *result["tables"]["token"]):
        assert row["note"] == f"{row['error']:.1e} off: not timed"
    assert result["rows"][0]["graph us"] is None
    monkeypatch.setattr(decode, "LONG", 16)
    given = ("--phases", "lengths", "--lengths", 16, 2**20, "--new", 4, "--limit", 1e-3)
    result, _ = _script("decode", *given, *SMALL_DECODE)
    assert [row["tokens of the prompt"] for row in result["rows"]] == [16]


def test_decode_over_contexts():
    given = ("--phases", "lengths", "softmax", "--lengths", 16, 300, "--contexts", 8, 40, "--new", 4)
    result, _ = _script("decode", *given, "--hows", "few rows", *SMALL_DECODE)
    assert [row["tokens of the prompt"] for row in result["rows"]] == [16, 300]
    held = [row["MB of the request"] for row in result["rows"]]
    assert held[0] == held[1] == pytest.approx(4 * 5 * 4 * 32**2 / 1e6)
    rows = result["tables"]["softmax"]
    assert [(row["model"], row["context"]) for row in rows] == [("tnl", "any"), ("softmax", 8), ("softmax", 40)]
    assert [row["MB of the request"] for row in rows[1:]] == [pytest.approx(4 * 4 * 2 * n * 128 / 1e6) for n in (8, 40)]


def test_a_softmax_models_step_with_keys_and_values_is_that_of_the_whole():
    """Of the model that stands beside TNL, with one layer: the same logits as without a cache."""
    models = importlib.import_module("decode_models")
    config = TNLConfig(50, layers=1, width=32, heads=2, glu_width=40)
    tokens = 6
    stepping = models.Stepping("softmax", config, 2, torch.device("cpu"), torch.float32, context=tokens)
    ids = torch.randint(50, (2, tokens), generator=torch.Generator().manual_seed(0))
    [block] = stepping.model.blocks
    with torch.no_grad():
        expected = stepping.model(ids)[:, -1]
        h = block.mixer_norm(stepping.model.embedding(ids))
        split = [layer(h).unflatten(-1, (2, 16)) for layer in (block.mixer.key, block.mixer.value)]
        split[0] = rotary(split[0], torch.arange(tokens))
        for held, x in zip((block.mixer.attention.keys, block.mixer.attention.values), split):
            held.copy_(x.transpose(1, 2))
            held[:, :, -1] = torch.nan  # which the step writes
    stepping.ids.copy_(ids[:, -1:])
    with stepping.entered("eager"):
        torch.testing.assert_close(stepping.step(), expected, atol=1e-4, rtol=1e-4)


def test_the_two_forms_of_inference(monkeypatch):
    monkeypatch.setattr(importlib.import_module("robust"), "T", 200)
    result, _ = _script("robust")
    found = {(row["form"], row["dtype"]): row for row in result["rows"]}
    assert found["origin", "float32"]["first at token"] in range(165, 179)
    assert found["origin", "float32"]["lambda^-t is infinite at"] == 178
    assert found["origin", "float16"]["first at token"] in range(12, 24)
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 1e-3)):
        assert found["robust", dtype]["heads with NaN"] == "0 of 8"
        assert found["robust", dtype]["error of the others"] < bound


# ---- the host's time


def test_what_the_host_does_for_a_call():
    """And that it does not come to more: each operation of PyTorch takes a GPU's host some microseconds."""
    import host

    found = {
        (row["operator"], row["decay"]): row
        for row in host.times(1, None, "triton", "cpu", host.CASES, calls=1, warm=1)
    }
    assert all(row["forward us"] > 0 and row["backward us"] > 0 for row in found.values())
    operators = {name: (row["aten"], row["launches"]) for name, row in found.items() if "layer" not in name[0]}
    assert operators == {
        ("linear_attention", "none"): ([3, 5], [1, 2]),
        ("linear_attention", "head"): ([3, 5], [1, 2]),
        ("linear_attention", "token"): ([6, 11], [4, 6]),
        ("linear_attention", "channel"): ([10, 15], [5, 8]),
        ("delta_rule", "none"): ([7, 15], [4, 7]),
        ("delta_rule", "token"): ([7, 18], [4, 8]),
        ("delta_rule", "channel"): ([13, 25], [6, 10]),
    }
    assert found["layer kda", "its own"]["launches"] == [6, 10]


def test_a_table_of_the_hosts_time():
    import host

    case = {"operator": "delta_rule", "aten": [8, 16], "launches": [4, 7]}
    ours = [[{**case, "forward us": x, "backward us": 40.0}] for x in (10.0, 12.0, 11.0)]
    theirs = [[{**case, "aten": [9, 16], "forward us": 22.0, "backward us": 50.0}]] * 3
    (alone,), (row,) = host.rows([ours]), host.rows([ours, theirs])
    assert (alone["forward us"], alone["forward us, middle half"]) == (11.0, "10 to 12")
    assert "forward us before" not in alone
    assert [row[f"{name} % of before"] for name in host.TIMES] == [50.0, 80.0]
    assert (row["aten"], row["aten before"]) == ([8, 16], [9, 16])
