"""compare.py: one table with intervals from any finished runs of one stage.

    for seed in 0 1 2; do for w in 0 10; do
        python repr_align.py --align_weight $w --seed $seed --out out/arms/w${w}_$seed
    done; done
    python -m studies.compare out/arms/*/                       # prints a Markdown table
    python -m studies.compare out/arms/*/ --keys bound val_loss --against out/arms/w0_0

Folders whose flags differ in --seed alone are one variant. Each variant is compared with the first
one, over the seeds that both have: a paired difference and its 95% interval.
"""
from dataclasses import dataclass
from pathlib import Path

from core.common import UserError, entry, parse, pick
from core.report import paired, plus_minus, table, verdict
from core.run import FREE, read_json, recorded


@dataclass
class Config:
    runs: tuple[str, ...] = ("out/bridge", "out/regression")  # folders, also without --runs
    keys: tuple[str, ...] = ()  # numbers of result.json, such as nfe.1.kl (none: the stage's)
    against: str = ""           # a folder of the variant to compare with (empty: the first folder)
    margin: float = 0.0         # a difference within it is a tie


# What a result.json holds -> the numbers of that stage
STAGE_KEYS = {"kl": ("kl", "ce_gap", "fvu"), "bound": ("bound",), "val_loss": ("val_loss",)}
HIGHER_IS_BETTER = {"agree", "overlap", "solved", "solved_in_window", "accuracy", "tokens_per_s"}


def read_run(folder):
    """{settings, seed, result} of a finished run."""
    result = read_json(f"{folder}/result.json", "finish that run first")
    record = recorded(folder)
    identity = dict(record["identity"])
    base = identity.pop("base", "")                     # one seed of two base models: two pairs
    settings = {**record["config"], **identity}
    seed = settings.pop("seed", 0)
    settings = {name: value for name, value in settings.items() if name not in FREE}
    if "nfe" in result:                                 # a bridge at its default number of calls
        result.update(result["nfe"][str(result["nfe_default"])])
    return {"settings": settings, "pair": (seed, base), "result": result, "folder": folder}


def number(run, key):
    """result[a][b] for the key a.b; the first entry of a list, which holds a standard error too."""
    value = run["result"]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, (int, float)):
        raise UserError(f"{run['folder']}/result.json holds no number {key}; choose other --keys")
    return value


def group(runs):
    """Lists of runs with equal settings, in the order of the first of each."""
    variants = []
    for run in runs:
        for variant in variants:
            if variant[0]["settings"] == run["settings"]:
                variant.append(run)
                break
        else:
            variants.append([run])
    return variants


def label(variant, variants):
    """The settings by which this variant differs from another one."""
    names = []
    for name, value in variant[0]["settings"].items():
        values = [other[0]["settings"].get(name) for other in variants]
        if any(other != value for other in values):
            names.append(f"{name} {value}")
    return ", ".join(names) or variant[0]["folder"]


def numbers(variant, key):
    """{pair: number}. A copy of a folder has the seed of the first, and is no run of its own."""
    return {run["pair"]: number(run, key) for run in variant}


def difference(variant, rival, key, margin):
    """The verdict on a variant against its rival by one number, over the pairs that both have."""
    ours = numbers(variant, key)
    theirs = numbers(rival, key)
    common = sorted(set(ours) & set(theirs))
    gap = paired([ours[pair] for pair in common], [theirs[pair] for pair in common])
    lower = HIGHER_IS_BETTER.isdisjoint(key.split("."))
    return verdict(gap, margin, lower_is_better=lower)


@entry
def main(argv):
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    cfg = parse(Config, argv, __doc__)
    variants = group([read_run(folder) for folder in cfg.runs])
    variant_of = {}                                     # a folder, without the shell's last slash
    for variant in variants:
        variant_of |= dict.fromkeys([Path(run["folder"]) for run in variant], variant)
    rival = pick(variant_of, Path(cfg.against or cfg.runs[0]), "--against")
    keys = cfg.keys
    for mark, stage_keys in STAGE_KEYS.items():
        if not keys and mark in rival[0]["result"]:
            keys = stage_keys

    columns = ["variant", "runs"]
    for key in keys:
        columns += [key, f"{key} against {label(rival, variants)}"]
    rows = []
    for variant in variants:
        row = [label(variant, variants), len({run["pair"] for run in variant})]
        for key in keys:
            row.append(plus_minus(numbers(variant, key).values(), ".4f"))
            row.append(None if variant is rival else difference(variant, rival, key, cfg.margin))
        rows.append(row)
    text = table(columns, rows)
    print(text)
    return text


if __name__ == "__main__":
    main()
