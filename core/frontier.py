"""frontier.py: methods that write text, compared where they are equally varied: search over temperature, table, words.

    tuned = tune(drawn, measured, apart, gap, [1.0])                         # which setting of each method
    points, ids = frontier(write, measured, text, gap, target, [1.0])        # until real text's entropy is reached
    text = table(result); lines = verdicts(result); rows = headline(result); figure(result, path)

A `row` is a method with one setting and one trained model: name, frontier (points of core.metrics.measure, each with
its temperature), matched (at_entropy of them), calls, tokens_per_s; of ours also group, layer, seed, steps, parameters.
`result` has rows, and the same metrics of real text under `real`. Letters: N texts, T tokens.
"""
import math
import statistics

import torch

from core import report
from core.metrics import SHAPE, at_entropy
from core.stats import paired, plus_minus, verdict

FACTOR, COLDEST, HOTTEST = 1.25, 0.4, 4.0  # of the temperatures that a frontier goes on with, and where it gives up
MARGIN = 0.05                              # nats a token: of no practical interest


def frontier(write, measured, text, gap, target, temperatures):
    """({temperature: metrics}, {temperature: ids}), from cold to hot: the given temperatures, and then colder or hotter
    ones until the entropy `target` lies between two of them. The tokens of text (N, T) in the slice `gap` are written,
    unseen; `right` is the share of the gap's tokens that became text's own, `exact` of whole gaps."""
    before, after = text[:, :gap.start], text[:, gap.stop:]                             # (N, P), (N, S)
    points, ids, todo = {}, {}, list(temperatures)
    while todo:
        for t in todo:
            ids[t] = torch.cat([write(before, after, t), after], 1)                    # (N, T)
            assert torch.equal(ids[t][:, :gap.start], before)
            points[t] = {"temperature": t, **measured(ids[t]),
                         "right": (found := (ids[t] == text)[:, gap].double()).mean().item(),
                         "exact": found.amin(1).mean().item()}
        seen = [p["entropy"] for p in points.values()]
        hotter, colder = round(max(points) * FACTOR, 4), round(min(points) / FACTOR, 4)
        todo = [hotter] if max(seen) < target and hotter <= HOTTEST else (
            [colder] if min(seen) > target and colder >= COLDEST else [])
    return dict(sorted(points.items())), ids


def nearest(points, target):
    """Points by how near their entropy is to `target`."""
    return sorted(points, key=lambda p: abs(p["entropy"] - target))


def tune(drawn, measured, text, gap, temperatures):
    """Choose settings on texts apart (N, T): of the (name, about, write) `drawn` those whose about holds the same
    "group" compete: most seeds at the entropy of `text` win, then the lowest gen-PPL there, seeds averaged.
    {group: {"chosen": name, "settings": {name: {"matched": [one a seed], "near": [temperatures around it]}}}}."""
    groups, target = {}, measured(text)["entropy"]
    for name, about, write in drawn:
        if "group" in about:
            some = groups.setdefault(about["group"], {}).setdefault(name, {"matched": [], "near": []})
            points, _ = frontier(write, measured, text, gap, target, temperatures)
            some["matched"].append(at_entropy(points.values(), target))
            some["near"] += [p["temperature"] for p in nearest(points.values(), target)[:2]]

    def rank(found):                                     # seeds that never get there, then the mean of the others
        there = [m for m in found["matched"] if m is not None]
        return len(found["matched"]) - len(there), statistics.mean(there or [math.inf])
    return {group: {"chosen": min(settings, key=lambda name: rank(settings[name])), "settings": settings}
            for group, settings in groups.items()}


def grouped(rows):
    """[(name, its rows)]: bridges and twins that differ in their seed alone."""
    groups = {}
    for row in rows:
        groups.setdefault((row["name"], row.get("steps"), row.get("parameters")), []).append(row)
    return [(name, group) for (name, *_), group in groups.items()]


def matched(group, form=".1f", key="matched"):
    values = [r[key] for r in group]
    return "never there" if None in values else plus_minus(values, form)


def table(result):
    """Markdown: one line a method, seeds as mean +- sd (of speed the fastest); what texts look like at the temperature
    nearest to real text's entropy."""
    filled = [key for key in ("right", "exact") if result.get("settings", {}).get("suffix")
              and all(key in r["frontier"][0] for r in result["rows"])]               # a run of before may lack one
    real, second, shape = dict.fromkeys(filled, 1.0) | result["real"], "second_ppl" in result["real"], (*SHAPE, *filled)
    rows = [["real text", "-", "-", f"{real['gen_ppl']:.1f}", "1.00",
             *([f"{real['second_ppl']:.1f}"] if second else []), "-", *(f"{real[k]:.2f}" for k in shape)]]
    for name, group in grouped(result["rows"]):
        near = [nearest(r["frontier"], real["entropy"])[0] for r in group]
        known = None not in [r["matched"] for r in group]
        ratio = f"{statistics.mean(r['matched'] for r in group) / real['gen_ppl']:.2f}" if known else "-"
        speed = max(r.get("tokens_per_s", 0) for r in group)
        rows.append([name, group[0].get("calls"), f"{speed:.0f}" if speed else None, matched(group), ratio,
                     *([matched(group, key="second_matched")] if second else []),
                     *(plus_minus([p[k] for p in near], ".2f") for k in ("temperature", *shape))])
    return report.table(["method", "calls", "tokens/s, one text", "gen-PPL at real entropy", "over real text",
                         *(["the same, second judge"] if second else []), "T there", "entropy", "diversity", "rep-4",
                         "tokens right", "gaps right"][:len(rows[0])], rows)


def ours(result):
    """[(name, rows)] of what is drawn in hidden space."""
    return grouped(r for r in result["rows"] if "layer" in r)


def rivals(result, mine):
    """[(name, rows)] of what else writes with no more calls than `mine`, one of our rows."""
    return grouped(r for r in result["rows"] if "layer" not in r and r.get("calls", math.inf) <= mine["calls"])


def reached(groups):
    """Those that reach real text's entropy, the lowest gen-PPL there first."""
    there = [(name, group) for name, group in groups if None not in [r["matched"] for r in group]]
    return sorted(there, key=lambda g: statistics.mean(r["matched"] for r in g[1]))


def verdicts(result):
    """Lines: our best layer against the others, ours against every rival at no more calls; log gen-PPL at real entropy,
    paired over seeds."""
    best, *others = reached(ours(result)) or [None]
    for other, theirs in others:
        yield f"- {best[0]} against {other}: {against(best[1], theirs)}."
    for name, group in reached(ours(result)):
        for other, theirs in reached(rivals(result, group[0])):
            yield f"- {name} against {other}: {against(group, theirs)}."


def against(group, theirs):
    """The verdict on two methods' rows, seed by seed where both have as many."""
    a, b = ([math.log(r["matched"]) for r in g] for g in (group, theirs))
    return verdict(paired(a, b if len(a) == len(b) else [statistics.mean(b)] * len(a)), MARGIN, "nats a token")


def headline(result):
    """[[what, value]]: ours at its best beside the best rival at no more calls."""
    for _, group in reached(ours(result))[:1]:
        name, end = group[0]["group"], f"real text {result['real']['gen_ppl']:.0f}"
        for other, theirs in reached(rivals(result, group[0]))[:1]:
            return [[f"gen-PPL at real entropy, {name}, and the best rival ({other})",
                     f"{matched(group)} ({against(group, theirs).split(' (')[0].split(' by ')[0]}), rival "
                     f"{matched(theirs)}, {end}"]]
        return [[f"gen-PPL at real entropy, {name}", f"{matched(group)}, {end}"]]
    return [["text drawn in hidden space", "never at real text's entropy"]]


def figure(result, path):
    """Every row's frontier, seeds of one method in one colour."""
    with report.figure(path, width=6.2, height=4.2) as axes:
        ax, real = axes[0, 0], result["real"]
        for number, (name, rows) in enumerate(grouped(result["rows"])):
            for i, row in enumerate(rows):                                         # one label for all seeds
                ax.plot([p["entropy"] for p in row["frontier"]], [p["gen_ppl"] for p in row["frontier"]], "o-",
                        markersize=3, color=f"C{number}", label=name if i == 0 else None)
        ax.plot(real["entropy"], real["gen_ppl"], "x", color=report.RED, markersize=10, mew=2, label="real text")
        ax.set(yscale="log", xlabel="entropy of a text's tokens (nats)", ylabel="gen-PPL, judged by the intact model",
               title="GENERATE: frontiers over temperature")
