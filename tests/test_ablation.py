"""The ablation of dmd_refine.py: equal budgets, honest comparisons, the same bits however its jobs are spread."""

import json
import shutil
import subprocess
import sys
import types

import pytest
import torch
from helpers import ROOT, broken, tiny_teacher

import awd
import data
import dmd_refine
import evaluate
from evaluate import NAMES, title
import meanflow_td
from models import student_from_teacher

# --- The plan --------------------------------------------------------------------------------------------------------


def test_variants_differ_in_what_they_are_named_for_and_share_the_budget():
    plan, td = dmd_refine.PLANS["default"], dict(steps=700, batch=64, lr=1e-3, momentum=0.3, clip=1.0, w=1.0)
    sections = dmd_refine.ablation_plan(plan, td)
    assert set(sections) == set(NAMES) and sections["hd"] == plan
    changed = {name: {key for key in plan if section.get(key) != plan[key]} for name, section in sections.items()}
    assert changed["mean"] == {"pooling"} and changed["dmd"] == {"pooling"}
    assert changed["hd-no-td"] == {"init", "steps"} and changed["dmd-no-td"] == {"init", "steps", "pooling"}
    for name, section in sections.items():
        without_td = name in ("hd-no-td", "dmd-no-td", "scratch")
        assert section["steps"] == plan["steps"] + 700 * without_td, name
    assert sections["scratch"] == {key: td[key] for key in td if key != "w"} | {"steps": plan["steps"] + 700}


def test_tables_name_students_by_their_settings():
    plan = dmd_refine.PLANS["default"]
    for name, section in dmd_refine.ablation_plan(plan, dict(steps=700, batch=64, lr=1e-3, clip=1.0, w=1.0)).items():
        assert title(name, section) == NAMES[name]
    assert title("two", plan | {"init": "teacher"}) == "two"
    assert title("hd", plan | {"pooling": "none"}) == "hd, pooling none"
    assert title("mean", plan | {"init": "teacher"}) == "mean, init teacher, pooling attention"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_variant_is_trained_by_what_its_name_says(tmp_path, monkeypatch, capsys):
    """Starts, guidance, pooling and updates of all jobs, whose training is replaced by a recorder; one that diverges is
    told."""
    jobs = {}

    def refine(student, teacher, fake, draw, *, name, steps, discriminator=None, **settings):
        pooling = None if discriminator is None else {head.pooling for head in discriminator.heads}
        jobs[name] = weights(student), teacher.w, fake.w, weights(fake), pooling, steps
        return student, []

    def train(net, draw, objective, *, name, steps, **settings):
        jobs[name] = weights(net), objective, steps, settings["momentum"]
        return net, []

    def weights(net):
        return {key: value.clone() for key, value in net.state_dict().items()}

    def agree(a, b):
        return all(torch.equal(a[key], b[key]) for key in a.keys() & b.keys())

    out = ["--quick", "--out", str(tmp_path)]
    meanflow_td.main([*out, "--teacher-steps", "1", "--td-steps", "5", "--w", "1.5"])
    monkeypatch.setattr(dmd_refine, "refine", refine)
    monkeypatch.setattr(meanflow_td, "train", train)
    monkeypatch.setattr(dmd_refine, "attention_weights", lambda *_, **__: (torch.zeros(8, 1, 16, 16), ()))
    monkeypatch.setattr(dmd_refine, "plot_attention", lambda *_, **__: None)
    monkeypatch.setattr(dmd_refine, "evaluate_run", lambda *_: [])
    monkeypatch.setattr(dmd_refine, "gradient_variance", lambda run, seed: {"data": 1.0, "teacher": 1.0})
    monkeypatch.setattr(dmd_refine, "plot_ablation", lambda *_: None)
    command = [*out, "--ablation", "--seeds", "1", "--refine-steps", "7", "--workers", "1"]
    dmd_refine.main(command)
    teacher, td = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["net"] for name in ("teacher", "td"))
    start, objective, steps, momentum = jobs.pop("scratch-seed0")
    assert momentum == 0  # as TD has it
    assert objective is meanflow_td.student_objective and steps == 12  # which without a teacher learns from eps - x_0
    assert not agree(start, td) and not agree(start, teacher)
    expected = {"hd": (td, {"attention"}, 7), "mean": (td, {"mean"}, 7), "dmd": (td, None, 7),
                "hd-no-td": (teacher, {"attention"}, 12), "dmd-no-td": (teacher, None, 12)}  # fmt: skip
    assert jobs.keys() == {f"{name}-seed0" for name in expected}
    for name, (origin, pooling, steps) in expected.items():
        student, w, w_fake, fake, *rest = jobs[f"{name}-seed0"]
        assert agree(student, origin) and agree(fake, teacher) and (w, w_fake) == (1.5, 1.0), name
        assert rest == [pooling, steps], name

    def diverge(*_, **__):
        raise FloatingPointError("The loss is nan.")

    def sentences():
        return json.loads((tmp_path / "ablation.json").read_text())["comparisons"]

    assert not any("diverged" in line for line in sentences())
    monkeypatch.setattr(dmd_refine, "refine", diverge)
    (tmp_path / "mean-seed0.pt").unlink()
    dmd_refine.main(command)
    assert [line for line in sentences() if "diverged" in line] == ["mean-seed0 diverged: it has no row."]
    assert "The loss is nan. The others go on." in capsys.readouterr().out


# --- The comparisons -------------------------------------------------------------------------------------------------


def rows_of(**values):
    """Rows as evaluate.py gives them; values: {section: Frechet distances}, with a recall that falls as they rise."""
    return [{"what": NAMES[name.replace("_", "-")], "nfe": 1, "frechet": value, "recall": 1 - value}
            for name, group in values.items() for value in group]  # fmt: skip


def verdicts(module, **values):
    """{pair: verdict of the Frechet distance} for those that were compared."""
    told = [line.split(": ", 1) for line in module.compare(rows_of(**values))]
    return {what: rest.rsplit(": ", 1)[-1] for what, rest in told if rest.startswith("frechet")}


def check_verdicts(module):
    told = verdicts(module, hd=(0.10, 0.11, 0.12), hd_no_td=(0.30, 0.31, 0.29), mean=(0.10, 0.12, 0.115),
                    dmd=(0.05, 0.06, 0.055), dmd_no_td=(0.2, 0.2))  # fmt: skip
    assert told["with AWD, a start from TD against none"] == "better"
    assert told["attention against mean pooling"] == "not separated"
    assert told["AWD against none"] == "worse"
    told = verdicts(module, hd=(0.1, 0.9), hd_no_td=(0.4, 1.4))  # twice as far, and twice as wide
    assert told["with AWD, a start from TD against none"] == "not separated"
    # of unequal spread and number: Student's test, which takes the spreads for equal, would have p = 0.001
    told = verdicts(module, hd=(0.1, 0.11, 0.12, 0.1, 0.11, 0.12, 0.1), hd_no_td=(0.2, 0.35))
    assert told["with AWD, a start from TD against none"] == "not separated"


def test_rows_are_told_apart_by_their_spread_and_one_seed_tells_nothing():
    check_verdicts(dmd_refine)
    assert "(3 and 2 seeds)" in dmd_refine.compare(rows_of(hd=(0.1, 0.2, 0.3), hd_no_td=(0.9, 0.8)))[0]
    line = dmd_refine.compare(rows_of(hd=(0.1,), hd_no_td=(0.9,)))[0]
    assert line.endswith("not compared, for that takes two seeds of each")
    recall = [line for line in dmd_refine.compare(rows_of(hd=(0.1, 0.11), hd_no_td=(0.5, 0.51))) if "recall" in line]
    assert recall[0].endswith("better")  # more is better there


@pytest.mark.parametrize("change", [
    ("sign * (np.mean(groups[0])", "-sign * (np.mean(groups[0])"), ('("hd", "mean")', '("hd", "dmd")'),
    (".pvalue < 0.05", ".pvalue < 2"), (".pvalue < 0.05", ".pvalue > 0.05"), ("equal_var=False", "equal_var=True")])
def test_a_broken_comparison_is_caught(change):
    with pytest.raises(AssertionError):
        check_verdicts(broken(dmd_refine, change))


# --- The variance of the gradient, and the picture -------------------------------------------------------------------


def check_variance(module):
    """Of one image, and no other, the teacher's velocity IS eps - x_0, so that both have one variance; a guided teacher
    or another sign has not."""
    student = student_from_teacher(tiny_teacher(1).net).requires_grad_(True)

    def teacher(x_t, *, t, y):
        return (x_t - 0.5) / t.view(-1, 1, 1, 1)

    def draw(batch, generator):
        return torch.full((batch, 1, 8, 8), 0.5), torch.randint(3, (batch,), generator=generator)

    nets = {"teacher": teacher, "td": type(tiny_teacher(0))(student)}
    run = types.SimpleNamespace(load=lambda name, two_times=False: nets[name], plan={"td": dict(batch=4, w=2.0)},
                                device=torch.device("cpu"), source=types.SimpleNamespace(draw=draw),
                                load_teacher=lambda: lambda *_, **__: 1 / 0)  # fmt: skip
    variance = module.gradient_variance(run, 0, batches=3)
    assert variance["data"] > 0 and variance["teacher"] == pytest.approx(variance["data"], rel=1e-3)


def test_where_the_teacher_knows_the_image_both_gradients_vary_alike():
    check_variance(dmd_refine)


@pytest.mark.parametrize("change", [
    ("else eps - x_0\n            loss, _", "else x_0 - eps\n            loss, _"),
    ('teacher, variance = run.load("teacher")', "teacher, variance = run.load_teacher()"),
    ('rng(seed, "gradient variance", k', "rng(seed, source, k")])  # fmt: skip
def test_a_broken_variance_is_caught(change):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check_variance(broken(dmd_refine, change))


def test_the_picture_has_the_teacher_at_its_best(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(dmd_refine, "save_figure", lambda path, figure: figures.append(figure))
    rows = rows_of(hd=(0.1, 0.2), dmd=(0.3, 0.4))
    rows += [{"what": "teacher, Heun", "nfe": 50, "w": w, "frechet": frechet, "recall": 1 - frechet}
             for w, frechet in [(1.0, 0.07), (1.25, 0.06), (1.5, 0.08)]]
    folder = types.SimpleNamespace(finished=lambda name: None)
    dmd_refine.plot_ablation(tmp_path / "a.png", rows, folder)
    frechet, recall, _ = figures[0].axes
    teacher = {axis: [line.get_xdata()[0] for line in axis.lines if line.get_label() == "teacher"]
               for axis in (frechet, recall)}  # fmt: skip
    assert teacher == {frechet: [0.06], recall: [0.94]}


# --- Where the discriminator looks -----------------------------------------------------------------------------------


def test_attention_weights_are_shares_and_find_a_planted_token():
    teacher = tiny_teacher(0)
    student = type(teacher)(student_from_teacher(teacher.net))
    channels = teacher.net.config["hidden_size"]
    discriminator = awd.AdaptiveWeightedDiscriminator([channels])
    eps, y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    x_gen, (weights,) = dmd_refine.attention_weights(student, teacher, discriminator, eps, y, taps=(1,))
    side = int(teacher.net.pos_embed.shape[1] ** 0.5)
    assert x_gen.shape == eps.shape and weights.shape == (8, side, side)
    torch.testing.assert_close(weights.flatten(1).sum(dim=1), torch.ones(8))
    assert weights.std() > 0
    discriminator.heads[0].query.data.zero_()  # a query that asks for nothing looks everywhere alike
    _, (even,) = dmd_refine.attention_weights(student, teacher, discriminator, eps, y, taps=(1,))
    torch.testing.assert_close(even, torch.full_like(even, 1 / side**2))


# --- The whole of it -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ablation_end_to_end_is_the_same_for_one_worker_and_two_and_goes_on(tmp_path):
    def run(script, *arguments):
        done = subprocess.run([sys.executable, ROOT / script, "--quick", *map(str, arguments)], cwd=ROOT, text=True,
                              capture_output=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    one, two = tmp_path / "one", tmp_path / "two"
    run("meanflow_td.py", "--out", one, "--teacher-steps", 4, "--td-steps", 2)
    net, accuracy = evaluate.train_classifier(16, steps=3)  # the whole recipe is tested elsewhere
    data.RunFolder(one, {}).stage("classifier", lambda keep: {"net": net.state_dict(), "accuracy": accuracy})
    shutil.copytree(one, two)
    for out, workers in ((one, 1), (two, 2)):
        text = run("dmd_refine.py", "--out", out, "--refine-steps", 2, "--ablation", "--seeds", 2, "--count", 100,
                   "--workers", workers)  # fmt: skip
        assert "AWD against none: frechet" in text and "times as much with eps - x_0" in text
    for name in NAMES:
        for seed in range(2):
            a, b = (torch.load(out / f"{name}-seed{seed}.pt", weights_only=True)["net"] for out in (one, two))
            assert all(torch.equal(a[key], b[key]) for key in a), (name, seed)
    rows = json.loads((two / "results.json").read_text())
    for title in NAMES.values():
        assert sorted(row["seed"] for row in rows if row["what"] == title) == [0, 1]
    told = json.loads((two / "ablation.json").read_text())
    assert len(told["comparisons"]) == 9 and all(v["data"] > 0 < v["teacher"] for v in told["gradient_variance"])
    assert (two / "ablation.png").stat().st_size > 10_000
    # what is there is not trained again; a seed more is
    before = (two / "hd-seed0.pt").stat().st_mtime_ns
    (two / "mean-seed1.pt").unlink()
    run("dmd_refine.py", "--out", two, "--ablation", "--seeds", 2, "--count", 100)
    assert (two / "hd-seed0.pt").stat().st_mtime_ns == before and (two / "mean-seed1.pt").exists()
