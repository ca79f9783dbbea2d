"""What quantization cost a task: the change with its paired interval, class by class, and metrics of the user's own."""

from __future__ import annotations

from bitwright import words
from bitwright.measure.metrics import ClassLoss, Evaluation, TaskLoss
from bitwright.measure.named import TASK_FIGURES
from bitwright.measure.shown import is_share, named_figures, shown_change, shown_figures
from bitwright.report.frame import Section, bullets, paragraph
from bitwright.report.markup import Markup
from bitwright.report.shown import Shown
from bitwright.report.tables import TableCell, page_table


def loss_of_task(run: Shown) -> Section | None:
    """The section; nothing where there was no truth, and for classification, which the page shows image by image."""
    found = run.result.evaluation
    loss = found.loss
    if loss is None or loss.task == "classification":
        return None
    title = "Metrics of your own" if loss.task is None else f"What {loss.task} lost"
    body = [_changes(loss), _own(found), _classes(loss), bullets(list(loss.notes)) if loss.notes else None]
    return Section("task", title, body) if any(body) else None


def _changes(loss: TaskLoss) -> Markup | None:
    """Each figure's change, and whether it is more than these images can show."""
    known = [(k, d) for k, d in loss.difference.items() if d.interval is not None]
    if not known:
        return None
    rows = []
    for key, change in known:
        low, high = change.interval or (0.0, 0.0)
        judged = "no measurable difference" if low <= 0 <= high else "better" if low > 0 else "worse"
        rows.append([named_figures(key), shown_change(key, change), judged])
    return page_table(
        "Quantized less float, on images drawn with replacement (95 % interval, paired)", ["", ">change", ""], rows
    )


def _own(found: Evaluation) -> Markup | None:
    """Figures that no task has: a metric of the user's own."""
    theirs, ours = found.reference, found.quantized
    keys = [k for k in (ours.values if ours else ()) if not is_share(k)]
    rows = [[named_figures(k), shown_figures(k, theirs), shown_figures(k, ours)] for k in keys]
    return page_table("Metrics of your own", ["", ">float", ">quantized"], rows) if rows else None


def _classes(loss: TaskLoss) -> list[Markup] | None:
    """The main figure of each class, those that lost most first."""
    if not loss.classes or loss.task is None:
        return None
    figure = next(iter(TASK_FIGURES[loss.task].values()))
    of = {"segmentation": "pixels", "detection": "objects"}.get(loss.task, "count")
    rows = [_class_row(c) for c in sorted(loss.classes, key=_lost, reverse=True)]
    said = f"{figure} of each class; those that lost most come first. Classes of few {of} say little."
    return [paragraph(said), page_table("Class by class", ["class", f">{of}", ">float", ">quantized", ">change"], rows)]


def _lost(each: ClassLoss) -> float:
    return (each.reference or 0.0) - (each.quantized or 0.0)


def _class_row(each: ClassLoss) -> list[TableCell | str]:
    name = str(each.number) if each.name is None else f"{each.number} {each.name}"
    change = -_lost(each)
    return [
        TableCell(name, each.number),
        TableCell(f"{each.count:,}", each.count),
        words.percent(each.reference),
        words.percent(each.quantized),
        TableCell(words.points(change), change),
    ]
