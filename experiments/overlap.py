"""Can gradients be sent while the last microbatch is still differentiated?

Data parallelism over eight devices: the sums of a step are complete after the last microbatch, and
are then sent, once. In a loop no layer's sum is complete before the loop ends, so that sending
begins when nothing is left to compute but the optimizer. With `unroll="last"` the last microbatch
comes after the loop: the sum of the last layer is complete when its backward pass is done, and
can travel while the layers below are differentiated. torch's `no_sync` and Megatron's
`overlap_grad_reduce` do the same.

Set-up: an AdamW step of 12 dense layers of width 1024, no scan over layers, 256 examples per device
and microbatch, float32, compiled for described devices and never run. XLA must be told not to
combine the sums, and on TPU to send asynchronously (`OPTIONS`); without that, as the rows "XLA's
own" show, `unroll="last"` hides less or nothing. Of the sums' bytes counts the share with a matrix
product between their start and their end in the schedule: the backward pass. Other operations
there are the optimizer's, and are counted apart. The last sum can only travel behind the optimizer.

Command   python -m experiments overlap      (pip install 'jaxaccum[experiments,tpu,gpu]')
Cost      a minute on two free cores
Expected  still one gradient is sent, outside of loops. In a loop none of it may travel behind a
          product; with `unroll="last"` at least half, whatever N. The price: one microbatch's
          program more to compile, and memory for at most half a gradient more
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

from experiments import _compiled_devices as places
from experiments import _compiled_steps as steps
from experiments import _compiled_ways as ways
from experiments import _report
from experiments._schedule import SMALL, Behind, sums_sent
from jaxaccum.testing import collectives

PLACES = {"h100:1x1x8": "gpu", "v5e:2x4": "tpu"}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_all_reduce_combine_threshold_bytes": 1},
    "tpu": {
        "xla_jf_crs_combiner_threshold_in_bytes": "1",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_reduce": "true",
    },
}
"""What XLA must be told, by the kind of device."""
FORMS = (1, "last")
CONTROL = 8
"""At this N `unroll="last"` is also compiled with XLA's own options, which combine the sums."""
LAYERS, WIDTH, EXAMPLES = 12, 1024, 256
BACKWARD, OPTIMIZER = "behind the backward pass", "behind the optimizer"


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    num_microbatches: Sequence[int] = (3, 8, 64),
    layers: int = LAYERS,
) -> _report.Record:
    """Every N in both forms, on the devices whose compiler is installed; with `full`, every power
    of two from 4 to 64. A loop of a single trip, as at N = 2, is no loop to XLA."""
    counts = (3, 4, 8, 16, 32, 64) if full else tuple(num_microbatches)
    here = [place for place, kind in PLACES.items() if places.installed(kind)]
    if not here:
        raise places.NoSuchDevice(places.missing("tpu"))
    points = [(place, n, form, True) for place in here for n in counts for form in FORMS]
    points += [(place, CONTROL, "last", False) for place in here]
    rows = [
        measured(place, n, form, told=told, layers=layers)
        for place, n, form, told in track(points, "overlap")
    ]
    return _report.Record(
        name="overlap",
        question="Can gradients be sent while the last microbatch is still differentiated?",
        settings={"compiled by": [places.compiler(PLACES[place]) for place in here]},
        rows=rows,
        checks=checks(rows),
        figure=picture([row for row in rows if row["options"] == "told"]),
    )


def measured(place: str, n: int, form: Any, *, told: bool, layers: int) -> dict[str, Any]:
    """A table's row: one step compiled, and its schedule read."""
    kind = PLACES[place]
    mesh = Mesh(places.described(place, kind), ("data",), axis_types=(AxisType.Auto,))
    params = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * layers
    size = sum(4 * leaf.size for leaf in params)
    state = jax.eval_shape(steps.OPTIMIZER.init, params)
    batch = jax.ShapeDtypeStruct((EXAMPLES * n * mesh.size, WIDTH), jnp.float32)
    shapes = [steps.laid(tree, mesh, P()) for tree in (params, state)]
    step = steps.step(ways.with_jaxaccum(loss, n, mesh, unroll=form))
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        *shapes, steps.laid(batch, mesh, P("data"))
    )
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=OPTIONS[kind] if told else {})
    seconds = time.perf_counter() - start
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    assert text is not None, "this compiler does not print its program"
    assert analysis is not None, "this compiler does not report its memory"
    sent = sums_sent(text)
    share = lambda behind: sum(one.bytes for one in sent if one.behind is behind) / size
    in_loops = [one for one in collectives(text) if one.loops and one.bytes >= SMALL]
    return {
        "place": place,
        "N": n,
        "unroll": form,
        "options": "told" if told else "XLA's own",
        "gradients sent": sum(one.bytes for one in sent) / size,
        "sums inside loops": len(in_loops),
        BACKWARD: share(Behind.PRODUCT),
        OPTIMIZER: share(Behind.OTHER),
        "temporary / parameters": analysis.temp_size_in_bytes / size,
        "compile s": seconds,
    }


def loss(params: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """Dense layers, each a leaf of its own."""
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def checks(rows: Sequence[dict[str, Any]]) -> list[_report.Check]:
    """One gradient is sent, and not in a loop; the loop hides nothing of it behind the backward
    pass, and the last microbatch at least half, if XLA is told to."""
    of = lambda form, options: [
        row for row in rows if row["unroll"] == form and row["options"] == options
    ]
    hidden = lambda *which: [row[BACKWARD] for row in of(*which)]
    return [
        _report.Check(
            "gradients sent per step, apart from 1",
            max(abs(row["gradients sent"] - 1) for row in rows),
            0.001,
        ),
        _report.Check("sums inside loops", max(row["sums inside loops"] for row in rows), 0),
        _report.Check(
            'unroll="last": share not behind the backward pass',
            1 - min(hidden("last", "told")),
            0.5,
        ),
        _report.Check("unroll=1: share behind the backward pass", max(hidden(1, "told")), 0),
        _report.Check(
            'unroll="last", XLA\'s own options: share behind the backward pass',
            max(hidden("last", "XLA's own"), default=0),
            0.5,
        ),
        _report.Check('memory of unroll="last", in gradients more', more_memory(rows), 0.5),
    ]


def more_memory(rows: Sequence[dict[str, Any]]) -> float:
    """The most that `unroll="last"` needs more than the loop, in units of the parameters."""
    key = "temporary / parameters"
    at = {
        (row["place"], row["N"], row["unroll"]): row[key]
        for row in rows
        if row["options"] == "told"
    }
    return max(at[place, n, "last"] - at[place, n, 1] for place, n, form in at if form == 1)


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """The share that is hidden, and the memory that it takes, against N."""
    figure, axes = _report.panels(2)
    titles = {
        BACKWARD: "share of a gradient behind the backward pass",
        "temporary / parameters": "temporary memory / parameters",
    }
    colours = dict(zip(PLACES, (_report.BLUE, _report.RED), strict=True))
    for panel, (key, title) in zip(axes, titles.items(), strict=True):
        for place in dict.fromkeys(row["place"] for row in rows):
            for form, style in zip(FORMS, ("--", "-"), strict=True):
                own = [row for row in rows if (row["place"], row["unroll"]) == (place, form)]
                label = f"{place.partition(':')[0]}, unroll={form!r}"
                x, y = [row["N"] for row in own], [row[key] for row in own]
                panel.plot(x, y, style, marker="o", color=colours[place], label=label)
        panel.set_xscale("log", base=2)
        counts = sorted({row["N"] for row in rows})
        panel.set_xticks(counts, [str(n) for n in counts])
        panel.set_xlabel("microbatches N")
        panel.set_title(title)
        panel.set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize=9)
    return figure
