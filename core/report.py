"""report.py: what all figures and tables of the report share.

    frontiers([(name, color, points)], real, path, title)      # entropy against gen-PPL over temperature
"""


def frontiers(lines, real, path, title):
    """Entropy against gen-PPL over temperature: one line for each (name, color, points) of `lines`, real text as a
    cross. Lines of one name share a label: they are its seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6.2, 4.2), constrained_layout=True)
    seen = set()
    for name, color, points in lines:
        ax.plot([p["entropy"] for p in points], [p["gen_ppl"] for p in points], "o-", markersize=3, color=color,
                label=None if name in seen else name)
        seen.add(name)
    ax.plot(real["entropy"], real["gen_ppl"], "x", color="#d1495b", markersize=10, markeredgewidth=2, label="real text")
    ax.set(yscale="log", xlabel="entropy of a text's tokens (nats)", ylabel="gen-PPL, judged by the intact model",
           title=title)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)
