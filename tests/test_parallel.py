"""Several ranks share the work of one run, and end with what one process ends with.

Ranks are real processes that talk by gloo. To be quick, most are forked from one that has imported torch already, with
the variables that torchrun would set; the slow test starts torchrun itself.
"""

from functools import partial
import json
import math
import multiprocessing
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
import torch._decomp.decompositions_for_jvp  # noqa: F401  what the first jvp imports: the server's processes have it
import torch._dynamo  # noqa: F401

import data
import dmd_refine
import evaluate
import meanflow_td
import toy2d
from awd import AdaptiveWeightedDiscriminator
from helpers import ROOT, broken, tiny_teacher, without_times
from test_latents import SIZE, TRUNCATED, make_tree, tiny_vae
from test_latents import contents as tree
from test_runs import contents, draw, equal

SCRIPTS = {"data": data, "meanflow_td": meanflow_td, "dmd_refine": dmd_refine, "evaluate": evaluate, "toy2d": toy2d}


def work(job, arguments, out, environment):
    """One rank: job(*arguments), its result in the file `out`, what it says in others beside it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    data.tqdm.set_lock(threading.RLock())  # else a semaphore of the system is left behind by a killed process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = open(f"{out}.out", "w"), open(f"{out}.err", "w")
    torch.save(job(*arguments), out)


@pytest.fixture(scope="module")
def fork():
    """start(job, arguments, out, environment) -> process."""
    context = multiprocessing.get_context("forkserver")
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])  # the server imports this file
    context.set_forkserver_preload(["test_parallel"])

    def start(*arguments):
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    yield start
    os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)


@pytest.fixture(scope="module")
def ranks(fork, tmp_path_factory):
    """ranks(job, *arguments, count=2) -> [(exit code, result, stdout, stderr) of each rank]; one is as no torchrun."""
    folder = tmp_path_factory.mktemp("ranks")

    def run(job, *arguments, count=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        outs = [folder / f"rank{k}" for k in range(count)]
        processes = [fork(job, arguments, out, {**shared, "RANK": str(k), "LOCAL_RANK": str(k)})
                     for k, out in enumerate(outs)]  # fmt: skip
        for process in processes:
            process.join(900)
        told = []
        for process, out in zip(processes, outs):
            result = torch.load(out, weights_only=False) if out.exists() else None
            said = [Path(f"{out}.{kind}").read_text() for kind in ("out", "err")]
            told.append((process.exitcode, result, *said))
            out.unlink(missing_ok=True)
        return told

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(ranks, tmp_path_factory):
    """A folder with train/, vae.pt, and the latents in cache/, made by one process."""
    root = tmp_path_factory.mktemp("imagenet")
    make_tree(root / "train")
    (root / "train" / TRUNCATED).unlink()
    torch.save(tiny_vae().state_dict(), root / "vae.pt")
    assert results(ranks(run, "data", encoding(root, root / "cache"), count=1)) == [0]
    return root


def encoding(root, cache):
    """The flags of data.py that encode the images of `made`, two in a shard."""
    return ["--encode", "--data-dir", root / "train", "--vae", root / "vae.pt", "--size", SIZE, "--batch", 2,
            "--shard-images", 2, "--device", "cpu", "--cache", cache]  # fmt: skip


def test_some_rows_of_a_draw_are_those_of_the_whole(made):
    folder = data.ImageFolder(made / "train", size=SIZE)
    sources = [data.Glyphs(16), folder, data.LatentCache(made / "cache"),
               data.EncodedFolder(folder, tiny_vae(), scale=0.18215)]  # fmt: skip
    for source in sources:
        generator = data.rng(0, "draw")
        whole = source.draw(7, generator)
        for rows in (slice(0, None, 3), slice(2, None, 3), slice(1, None, 2)):
            again = data.rng(0, "draw")
            x_0, y = source.draw(7, again, rows)
            torch.testing.assert_close(x_0, whole[0][rows], rtol=0, atol=1e-6)  # a VAE's rounding knows its batch
            assert torch.equal(y, whole[1][rows])
            assert torch.equal(again.get_state(), generator.get_state())  # what follows is drawn as ever


MUTATIONS = {
    "the mean": ("x.copy_(part.view_as(x))", "x.copy_(part.view_as(x) / world()[1])"),
    "no sum": ("            dist.all_reduce(flat)", "            pass"),
    "a bucket that is not emptied": ("_as(x))\n        bucket, size = [], 0", "_as(x))\n        size = 0"),
    "the same rows on all ranks": ("return slice(world()[0], None,", "return slice(0, None,"),
}


def own_draw(batch, generator):
    """Images and labels of which a rank sees its own rows, as a run on images does it."""
    run = meanflow_td.ImageRun.__new__(meanflow_td.ImageRun)
    run.source = types.SimpleNamespace(draw=lambda batch, generator, rows: [x[rows] for x in draw(batch, generator)])
    return run.draw(batch, generator)


def fit(steps, accumulate=1, pooling=("attention", None), mutation=None):
    """Updates by batches of 8 of a teacher, a student, and stage 2 with each pooling.

    -> {name: (gradients of the last one, all weights and buffers, rows of metrics)}. mutation: breaks data.py."""
    module = data if mutation is None else broken(data, MUTATIONS[mutation])
    for user in (meanflow_td, dmd_refine):
        for name in {"add_up", "own_share", "world"} & vars(user).keys():
            setattr(user, name, getattr(module, name))
    module.BUCKET = 2000  # bytes: several buckets, of one tensor and of more
    how = dict(steps=steps, batch=8, seed=0, stream="t", name="t", accumulate=accumulate, log_every=1,
               clip=math.inf)  # a gradient that is cut to one length tells nothing of its own
    found = {}

    def note(name, rows, *nets):
        grads = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
        found[name] = grads, [entry for net in nets for entry in net.state_dict().values()], without_times(rows)

    with module.ranks("cpu"):
        teacher = tiny_teacher(9).requires_grad_(False)
        for name, objective in (("teacher", partial(meanflow_td.teacher_objective, null_class=3)),
                                ("student", partial(meanflow_td.student_objective, teacher=teacher))):  # fmt: skip
            net = tiny_teacher(1, two_times=name == "student")
            ema, rows = meanflow_td.train(net, own_draw, objective, lr=1e-2, **how)
            note(name, rows, net, ema)
        for kind in pooling:
            student, fake, discriminator = tiny_teacher(1, two_times=True), tiny_teacher(3), None
            if kind:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    discriminator = AdaptiveWeightedDiscriminator([16, 16], kind)
            lr = 0.0 if steps == 1 else 1e-2  # Adam's first step is a matter of signs, and rounding decides some
            ema, rows = dmd_refine.refine(student, teacher, fake, own_draw, discriminator=discriminator, taps=(0, 1),
                                          lr=lr, lr_fake=lr, lr_discriminator=lr, lambda_td=0.5, student_steps=2,
                                          **how)  # fmt: skip
            note(f"refined, {kind}", rows, student, fake, ema, *[discriminator] * bool(kind))
    return found


def check_sums(whole, told, logged=True):
    """Gradients and what is logged are those of one process; and all ranks end with the same bits.

    logged=False: for parts that are not of one size, whose means are logged as if they were."""
    assert not any(code for code, *_ in told), told
    first, *others = (found for _, found, _, _ in told)
    for name, (grads, _, rows) in whole.items():
        size = max(g.abs().max().item() for g in grads)
        assert size > 1e-3
        for a, b in zip(first[name][0], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * max(1, size))
        for a, b in zip(first[name][2], rows, strict=True) if logged else ():
            assert a.keys() == b.keys()
            for key in a.keys() - {"network", "gen_std"}:  # a rank knows the spread of its own samples alone
                assert a[key] == pytest.approx(b[key], rel=1e-4), (name, key)
    assert first.keys() == whole.keys() and all(equal(first, other) for other in others)


@pytest.fixture(scope="module")
def fitted(ranks):
    """`fit` by one process."""
    return ranks(fit, 1, count=1)[0][1]


def test_two_ranks_have_the_gradients_of_one(ranks, fitted):
    check_sums(fitted, ranks(fit, 1))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_sums_are_caught(ranks, fitted, mutation):
    told = ranks(fit, 1, 1, (), mutation)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_sums({name: fitted[name] for name in ("teacher", "student")}, told)


def test_weights_stay_equal_on_all_ranks_to_the_bit(ranks):
    """And to those of one process that takes each batch in as many parts, if no spectral norm counts its passes."""
    told, whole = ranks(fit, 3), ranks(fit, 3, 2, (None,), count=1)[0][1]
    assert [code for code, *_ in told] == [0, 0], told
    first, second = (found for _, found, _, _ in told)
    assert equal(first, second) and len(first) == 4
    assert equal({name: first[name] for name in whole}, whole)


def test_ranks_take_their_shares_in_parts_too(ranks, fitted):
    check_sums({name: fitted[name] for name in ("teacher", "student")}, ranks(fit, 1, 2, (), count=3), logged=False)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts
# ---------------------------------------------------------------------------------------------------------------------


def run(script, arguments, patch=None):
    """A script's main. -> its exit code, and the names of all files that it wrote. patch(rank): goes first."""
    written, write_whole, classifier = [], data.write_whole, evaluate.train_classifier

    def noted(path, write):
        written.append(Path(path).name)
        write_whole(path, write)

    data.write_whole = dmd_refine.write_whole = noted
    data.LAST_WORDS, evaluate.SAMPLE_BATCH = 0, 40
    evaluate.train_classifier = lambda size: classifier(size, steps=3, batch=16)
    if patch is not None:
        patch(int(os.environ["RANK"]))
    try:
        SCRIPTS[script].main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code or 0, written
    return 0, written


def results(told):
    """Exit codes of the scripts, after a look at what each rank said."""
    for rank, (code, result, out, err) in enumerate(told):
        assert code == 0 and "Traceback" not in err, err
        assert rank == 0 or not out, out
    return [result[0] for _, result, _, _ in told]


TRAIN = ["--quick", "--teacher-steps", 3, "--td-steps", 3, "--out"]
REFINE = ["--quick", "--refine-steps", 2, "--pooling", "none", "--student-steps", 2, "--out"]


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """What one process leaves that takes each batch in two parts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    for script, arguments in (("meanflow_td", TRAIN), ("dmd_refine", REFINE)):
        assert results(ranks(run, script, [*arguments, out, "--accumulate", 2], count=1)) == [0]
    return out


@pytest.mark.slow
def test_two_ranks_leave_what_one_process_leaves(ranks, tmp_path, whole):
    out = tmp_path / "run"
    for script, arguments in (("meanflow_td", [*TRAIN, out]), ("dmd_refine", [*REFINE, out])):
        told = ranks(run, script, arguments)
        assert results(told) == [0, 0]
        assert len(told[0][1][1]) > 5 and told[1][1][1] == [] and "In " in told[0][2]
    assert equal(contents(out), contents(whole))
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert sorted(path.name for path in out.rglob("*")) == sorted(path.name for path in whole.rglob("*"))
    told = ranks(run, "dmd_refine", ["--name", "other", "--quick", "--refine-steps", 1, "--out", out])
    assert results(told) == [0, 0] and (out / "attention-other-seed0.png").exists()
    again = ranks(run, "dmd_refine", [*REFINE, out])  # it is finished
    assert results(again) == [0, 0] and again[0][1][1] == again[1][1][1] == []


def test_samples_are_the_same_whoever_makes_them(ranks, tmp_path, whole):
    told = {}
    for count in (1, 2, 3):
        told[count] = ranks(run, "evaluate", ["--sample", 7, "--batch", 2, "--checkpoint", whole, "--out",
                                              tmp_path / str(count)], count=count)  # fmt: skip
        assert results(told[count]) == [0] * count
    pictures = [[name for name in result[1] if name[0] == "0"] for _, result, _, _ in told[3]]
    assert [len(names) for names in pictures] == [3, 2, 2]  # batches of 2, 2, 2 and 1
    assert all(name[0] == "0" for _, result, _, _ in told[3][1:] for name in result[1])
    one, two, three = ({path.name: path.read_bytes() for path in (tmp_path / str(count)).rglob("*.*")}
                       for count in (1, 2, 3))  # fmt: skip
    assert one == two == three and len(one) == 7 + len(["grid.png", "fingerprint.json"])
    assert "of each" not in told[1][0][2] and "on each of 3 ranks." in told[3][0][2]


@pytest.mark.slow
def test_the_table_is_the_same_whoever_makes_it(ranks, tmp_path, whole):
    rows = []
    for count in (1, 2):
        out = tmp_path / str(count)
        shutil.copytree(whole, out)
        told = ranks(run, "evaluate", ["--data", "glyphs", "--quick", "--count", 100, "--out", out], count=count)
        assert results(told) == [0] * count and all(result[1] == [] for _, result, _, _ in told[1:])
        rows.append([{**row, "ms_per_image": 0} for row in json.loads((out / "results.json").read_text())])
        assert (out / "grid.png").exists() and (out / "spectrum.png").exists()
    assert rows[0] == rows[1] and len(rows[0]) > 10


def test_latents_are_the_same_whoever_encodes_them(ranks, tmp_path, made):
    whole = tree(made / "cache")
    told = ranks(run, "data", encoding(made, tmp_path / "cache"), count=3)
    assert results(told) == [0, 0, 0]
    shards = [sorted(set(result[1]) - {"manifest.json"}) for _, result, _, _ in told]
    assert shards == [["moments-00000.npy", "moments-00003.npy"], ["moments-00001.npy", "moments-00004.npy"],
                      ["moments-00002.npy", "moments-00005.npy"]]  # fmt: skip
    assert tree(tmp_path / "cache") == whole
    told = data.read_manifest(tmp_path / "cache")  # of a killed rank 0, which knew of its own shards alone
    told["shards"] = {name: told["shards"][name] for name in shards[0]}
    data.write_json(tmp_path / "cache" / "manifest.json", {**told, "sha256": data.sha256_json(told)})
    (tmp_path / "cache" / "moments-00002.npy").unlink()
    (tmp_path / "cache" / "moments-00001.npy.17.partial").write_text("half")
    told = ranks(run, "data", encoding(made, tmp_path / "cache"))
    assert results(told) == [0, 0] and tree(tmp_path / "cache") == whole
    assert {name for _, result, _, _ in told for name in result[1]} == {"moments-00002.npy", "manifest.json"}


# ---------------------------------------------------------------------------------------------------------------------
# When something goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def at_step(act, when, rank):
    """Patch a rank: each step is saved, and rank `when` does act(x_0) in its third step, with what it has drawn."""
    data.Keep.EVERY, whole_draw, steps = 0, meanflow_td.ImageRun.draw, []

    def drawn(run, batch, generator):
        steps.append(batch)
        x_0, y = whole_draw(run, batch, generator)
        if rank == when and len(steps) == 3:
            act(x_0)
        return x_0, y

    meanflow_td.ImageRun.draw = drawn


def die(x_0):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(x_0):
    signal.raise_signal(signal.SIGINT)


def spoil(x_0):
    x_0[5] = torch.inf


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others(ranks, tmp_path, victim):
    out = tmp_path / "run"
    told = ranks(run, "meanflow_td", [*TRAIN, out], partial(at_step, die, victim))
    assert told[victim][0] == -signal.SIGKILL
    code, result, _, err = told[1 - victim]
    assert code == 0 and result[0] == 2, err
    assert "another process of this run is gone" in err and "the same command goes on" in err and "Trace" not in err
    assert data.read_checkpoint(out / "teacher.unfinished")["steps"] == 2


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(ranks, tmp_path):
    told = ranks(run, "meanflow_td", [*TRAIN, tmp_path / "run"], partial(at_step, interrupt, 1))
    assert [result[0] for _, result, _, _ in told] == [130, 130], told
    assert data.read_checkpoint(tmp_path / "run" / "teacher.unfinished")["steps"] == 3
    assert told[0][3].endswith("stopped; the same command goes on from where it last saved\n") and not told[1][3]


def test_numbers_that_are_not_finite_stop_all_ranks_with_one_report(ranks, tmp_path):
    told = ranks(run, "meanflow_td", [*TRAIN, tmp_path / "run"], partial(at_step, spoil, 1))  # row 5 is rank 1's
    assert [result[0] for _, result, _, _ in told] == [3, 3], told
    report = json.loads((tmp_path / "run" / "teacher.diverged.json").read_text())
    assert report["worst rows"][0]["row"] == 5 and "step 2" in report["where"] and report["term"] == "loss"
    assert data.read_checkpoint(tmp_path / "run" / "teacher.unfinished")["steps"] == 2
    assert "teacher.diverged.json" in told[0][1][1] and told[1][1][1] == []


def test_ranks_that_see_different_folders_stop(ranks, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "0")
    told = ranks(run_apart, tmp_path)
    assert [result[0] for _, result, _, _ in told] == [2, 2]
    assert all("it has to be on a disk that all machines share" in err for *_, err in told)


def run_apart(folder):
    return run("meanflow_td", [*TRAIN, folder / os.environ["RANK"]])


@pytest.mark.parametrize("script, arguments", [
    ("toy2d", "--quick --out OUT"), ("dmd_refine", "--quick --ablation --out OUT"), ("evaluate", "--flops"),
    ("meanflow_td", "--data imagenet --dry-run"), ("dmd_refine", "--data imagenet --dry-run"),
    ("evaluate", "--images OUT --reference glyphs --out OUT"),
])  # fmt: skip
def test_what_is_not_divided_refuses_torchrun(tmp_path, monkeypatch, capsys, script, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(arguments.replace("OUT", str(tmp_path / "out")).split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.endswith("is not divided among processes: start it without torchrun\n"), err
    assert not (tmp_path / "out").exists()


def test_too_small_a_batch_is_refused(ranks, tmp_path):
    told = ranks(run, "meanflow_td", [*TRAIN, tmp_path / "run", "--accumulate", 17])
    assert [result[0] for _, result, _, _ in told] == [2, 2]
    assert "a batch of 32 can't be taken in 34 parts" in told[0][3]


KILL = """
import os, signal, sys
import data, dmd_refine, meanflow_td
victim, last, gathered, calls = sys.argv[2], int(sys.argv[3]), data.gathered, []
def gathered_or_killed(value):
    calls.append(value)
    if os.environ["RANK"] == victim and len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return gathered(value)
data.Keep.EVERY, data.gathered = 0, gathered_or_killed
sys.modules[sys.argv[1]].main(sys.argv[4:])
"""


@pytest.mark.slow
def test_a_killed_rank_ends_torchrun_and_the_same_command_goes_on(tmp_path, made, whole):
    """With torchrun itself: a rank is killed as it meets the others, early, midway and late."""
    (tmp_path / "kill.py").write_text(KILL)

    def torchrun(script, arguments, victim=None, last=0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   tmp_path / "kill.py", script, victim, last, *arguments]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        begun = time.monotonic()
        done = subprocess.run(list(map(str, command)), env=environment, text=True, capture_output=True, timeout=600)
        return done.returncode, time.monotonic() - begun, done.stderr

    out, cache = tmp_path / "run", tmp_path / "cache"
    for script, arguments, kills in [
        ("meanflow_td", [*TRAIN, out], [(0, 3), (1, 11), (0, 12)]), ("dmd_refine", [*REFINE, out], [(1, 10)]),
        ("data", encoding(made, cache), [(1, 4)]),
    ]:  # fmt: skip
        for victim, last in kills:
            code, seconds, err = torchrun(script, arguments, victim, last)
            print(f"{script}: rank {victim} killed at meeting {last}; torchrun ended after {seconds:.0f} s with {code}")
            assert code not in (0, 2) and "SIGKILL" in err, err
        code, _, err = torchrun(script, arguments)
        assert code == 0, err
    assert equal(contents(out), contents(whole)) and tree(cache) == tree(made / "cache")
    assert not list(out.glob("*.unfinished*")) and not list(tmp_path.rglob("*.partial"))
