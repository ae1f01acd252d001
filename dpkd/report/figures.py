"""The figures of an evaluation in tables and sentences, from `evaluation.json`. Accuracies are fractions in [0, 1]."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

DASH = "–"
OF_MASKS = ("mean_dice", "boundary_iou", "boundary_f", "mean_iou")
"""The keys of the figures of masks; the last is the one by which students are judged."""
KNOWN, MAX_INTERVAL = "known_classes", 0.05
"""The key of accuracy on known classes, and the half of a 95 % interval above which a sentence warns."""
KNOWN_CLASSES = "Accuracy on known classes"

Table = list[list[str]]
Scores = Mapping[str, dict[str, float]]
"""`{"mean", "ci95"}` by key."""


def percent(score: dict[str, float], *, sign: str = "") -> str:
    """`{"mean", "ci95"}` as `56.1 ± 0.4 %`; with `sign="+"`, as a signed difference."""
    return f"{100 * score['mean']:{sign}.1f} ± {100 * score['ci95']:.1f} %"


def rate_words(per_s: float | None) -> str:
    """Images per second as text: `1,234`."""
    return DASH if per_s is None else f"{per_s:,.0f}"


def count_words(count: int) -> str:
    """A number of parameters as text: `110 k`, `1.25 M`, `22 M`."""
    if count < 1_000_000:
        return f"{count / 1e3:.0f} k"
    return f"{count / 1e6:.2f} M" if count < 10_000_000 else f"{count / 1e6:.0f} M"


def column_words(key: str) -> str:
    """A kind of figure as text: `5way_1shot` is `1-shot`, and `mean_iou` is `mean IoU`."""
    words = key.rpartition("way_")[2].replace("shot", "-shot").replace("_", " ").replace("boundary f", "boundary F")
    return words.replace("auroc", "AUROC").replace("iou", "IoU").replace("dice", "Dice")


def chart_words(key: str, split: str, *, of: str = "") -> str:
    """What a chart shows, with `of` which networks: `accuracy in %, val, 5-shot`, or `mean IoU in %, test`."""
    if key == KNOWN or key.endswith("shot"):
        return f"accuracy{of} in %, {split}, {column_words(key)}"
    return f"{column_words(key)}{of} in %, {split}"


def markdown_table(rows: Table) -> list[str]:
    """The lines of a Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


class Evaluation:
    """What an evaluation says; `tree` is the content of `evaluation.json`, or a summary that has it."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree, self.protocol, self.students = tree, tree["protocol"], tree["students"]
        self.split = str(tree["splits"]["test"] or tree["splits"]["val"])
        """The split of the first table: the test split, or without one the validation split."""

    @property
    def num_images(self) -> int:
        """The number of labelled images of the split, or without labels of those with a mask."""
        return int(self.tree["labelled"][self.split])

    @cached_property
    def alone(self) -> str:
        """What the baselines have learnt from, by what is measured: `labels alone`, `masks alone`, or both."""
        figures = (each["scores"] for kind in ("students", "baselines") for each in self.tree[kind].values())
        keys = {key for of_network in figures for scores in of_network.values() for key in scores}
        kinds = ["labels"] * (not keys or not keys <= {*OF_MASKS}) + ["masks"] * bool(keys & {*OF_MASKS})
        return f"{' and '.join(kinds)} alone"

    @cached_property
    def groups(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The networks by title: by student, which may have baselines alone, and the teachers by an empty name."""
        groups = {name: {f"student {name}": student} for name, student in self.students.items()}
        for key, baseline in self.tree["baselines"].items():
            name, _, kind = key.partition(".")
            words = {"": "", "plain": ", plain cross-entropy"}.get(kind, f", {kind[1:]} x steps")
            groups.setdefault(name, {})[f"{name} on {self.alone}{words}"] = baseline
        live = {f"{name}, after distilling": each for name, each in self.tree.get("live_teachers", {}).items()}
        return groups | {"": self.tree["teachers"] | live}

    @cached_property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Every network by the title that users read: each student and its baselines, then the teachers."""
        return {title: network for group in self.groups.values() for title, network in group.items()}

    @cached_property
    def judged(self) -> str:
        """The key of the figure that students are judged by: of masks, on known classes, or with most shots."""
        scores = (network["scores"][self.split] for network in self.networks.values())
        return next((list(keys)[-1] for keys in scores if keys), KNOWN)

    def exported(self, network: Mapping[str, Any]) -> dict[str, float] | None:
        """The figure of a network as it is exported, of the kind that students are judged by, if it has it."""
        scores: Scores = network.get("plain_pooling", network["scores"])[self.split]
        return scores.get(self.judged)

    @property
    def heading(self) -> str:
        """What the first table shows."""
        split, by = self.split, f"mean ± 95 % interval; images/s on {self.tree['device']}"
        if "way" in self.protocol:
            episodes = (
                f"{self.protocol['way']} classes an episode, the same {self.protocol['episodes']:,} episodes for all"
            )
            return f"Few-shot accuracy on {split}: {episodes}, {by}"
        if "labels" in self.protocol:
            return f"Ranking of {self.num_images:,} images of {split} by each of {self.protocol['labels']} labels, {by}"
        if self.alone == "masks alone":
            return f"Segmentation of {self.num_images:,} images of {split}, {by}"
        return f"Accuracy on {self.num_images:,} labelled images of {split}, {by}"

    def first_table(self) -> Table:
        """The figures of every network on the split, as it is exported; with its prior map in a row below.

        A student's gain over labels alone follows its baselines. `notes` explain the stars.
        """
        keys = list(dict.fromkeys(key for each in self.networks.values() for key in each["scores"][self.split]))
        rows = [["", "parameters", "images/s", *map(column_words, keys)]]

        def add(title: str, by_split: Mapping[str, Scores], *facts: str, sign: str = "") -> None:
            scores = by_split[self.split]
            cells = [percent(scores[key], sign=sign) if key in scores else DASH for key in keys]
            rows.append([title, *(facts or ("", "")), *cells])

        for student, group in self.groups.items():
            for name, network in group.items():
                title = f"{name} *" if self.split in network.get("seen", {}) else name
                facts = count_words(network["parameters"]), rate_words(network["images_per_s"])
                add(title, network.get("plain_pooling", network["scores"]), *facts)
                if "plain_pooling" in network:
                    add("  with its prior map", network["scores"])
            if gains := self.students.get(student, {}).get("over_baseline"):
                add(f"{student}: gain over {self.alone}", gains, sign="+")
        return rows

    def tables(self) -> dict[str, Table]:
        """The tables by title, that of few-shot accuracy first, or of accuracy without episodes."""
        without = "Segmentation" if self.alone == "masks alone" else "Accuracy"
        without = "Ranking by label" if "labels" in self.protocol else without
        tables = {"Few-shot accuracy" if "way" in self.protocol else without: self.first_table()}
        titles = {"probes": "kNN and linear probe", "classification": KNOWN_CLASSES}
        for key, title in (titles | {"zero_shot": "Zero-shot through attributes"}).items():
            measured = {name: network[key] for name, network in self.networks.items() if network.get(key)}
            columns = {(split, part): None for table in measured.values() for split in table for part in table[split]}
            rows = [["", *(f"{split} {part}" for split, part in columns)]]
            for name, table in measured.items():
                shares = [table.get(split, {}).get(part) for split, part in columns]
                rows.append([name, *(DASH if share is None else f"{100 * share:.1f} %" for share in shares)])
            tables |= {title: rows} if measured else {}
        for name, network in self.networks.items():
            for split, classes in network.get("segmentation", {}).items():
                header, row = [""], [name]
                for each, of in classes.items():
                    header += [f"{each} IoU", f"{each} Dice", f"{each} HD95"]
                    row += [f"{100 * of['iou']:.1f} %", f"{100 * of['dice']:.1f} %", f"{of['hd95_px']:.1f} px"]
                tables.setdefault(f"Segmentation by class, {split}", [header]).append(row)
        return tables

    def class_tables(self) -> dict[str, Table]:
        """By title, the accuracy of each class of a split that the networks know, the worst of the first network first.

        Where an image may have several labels, the average precision and the AUROC of each label.
        """
        tables = {}
        for split in filter(None, self.tree["splits"].values()):
            several, measured = (
                {name: each[kind][split] for name, each in self.networks.items() if split in each.get(kind, {})}
                for kind in ("labels", "per_class")
            )
            if several:
                name, first = next(iter(several.items()))
                rows = [["label", "images", "visible in training", *several, f"AUROC of {name}"]]
                for label in sorted(first, key=lambda label: first[label]["trained"]):
                    scores = [labels[label]["precision"] for labels in several.values()] + [first[label]["auroc"]]
                    cells = [DASH if score is None else percent(score) for score in scores]
                    rows.append([label, f"{first[label]['samples']:,}", f"{first[label]['trained']:,}", *cells])
                tables[f"Average precision by label, {split}"] = rows
            if measured:
                name, first = next(iter(measured.items()))
                rows = [["class", "labels", "samples", *measured, f"{name}, 95 %", "takes it for", "such as"]]
                for label in sorted(first, key=lambda label: first[label]["accuracy"]):
                    of, (low, high) = first[label], first[label]["ci95"]
                    shares = [f"{100 * classes[label]['accuracy']:.1f} %" for classes in measured.values()]
                    row = [
                        label,
                        f"{of['train']:,}",
                        f"{of['samples']:,}",
                        *shares,
                        f"{100 * low:.0f} to {100 * high:.0f}",
                    ]
                    rows.append([*row, of["mistaken_for"] or DASH, ", ".join(of["examples"]) or DASH])
                tables[f"Accuracy by class, {split}"] = rows
        return tables

    def notes(self) -> list[str]:
        """Sentences on networks whose weights were trained on the classes, and on what few images can show."""
        notes = []
        seen = {
            name: each["seen"][self.split] for name, each in self.networks.items() if self.split in each.get("seen", {})
        }
        if seen:
            classes = sorted({name for names in seen.values() for name in names})
            few = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
            whose = f"weights of {', '.join(seen)} or of a teacher"
            count = f"{len(classes)} classes of {self.split} ({few})"
            notes.append(f"* invalid: {whose} have seen {count}, as teachers.<name>.seen says")
        known = (network["scores"][self.split].get(KNOWN, {}) for network in self.networks.values())
        if (widest := max((score.get("ci95", 0.0) for score in known), default=0.0)) > MAX_INTERVAL:
            notes.append(
                f"accuracy on {self.num_images:,} images may be off by {100 * widest:.0f} points: label more of "
                f"{self.split} to know it better"
            )
        return notes

    def not_better(self) -> dict[str, str]:
        """A sentence for each student that is not better than its baseline in the figure that it is judged by.

        Where masks are measured, also for one that is better in that figure and worse in another.
        """
        sentences, baseline = {}, f"the same network on {self.alone}"
        for name, student in self.students.items():
            if "over_baseline" not in student:
                continue
            gains = student["over_baseline"][self.split]
            judged, gain = list(gains.items())[-1]
            words, worse, better = percent(gain, sign="+"), gain["mean"] < -gain["ci95"], gain["mean"] > gain["ci95"]
            others = [
                f"{column_words(key)} is {'lower' if better else 'higher'} ({percent(other, sign='+')})"
                for key, other in gains.items()
                if key in OF_MASKS and (-other["mean"] if better else other["mean"]) > other["ci95"]
            ]
            but = f", but {' and '.join(others)}" if others else ""
            if better and others:
                figure = f"the {column_words(judged)} of student {name}"
                sentences[name] = f"{figure} is higher than that of {baseline} ({words}){but}"
            elif not better and not worse and gain["ci95"] > MAX_INTERVAL:
                sentences[name] = (
                    f"student {name}: too few images are measured to tell it from {baseline} ({words}){but}"
                )
            elif not better:
                sentences[name] = (
                    f"student {name} is {'worse' if worse else 'no better'} than {baseline} ({words}){but}: use the "
                    f"network in baselines/{student.get('baseline', name)}, or try more steps, more unlabelled images, "
                    "or a teacher that is better than this baseline without its prior map"
                )
        return sentences

    def verdicts(self) -> list[tuple[str, bool]]:
        """What each exported student reaches, what to do if that is little, and whether it is above its baseline."""
        worse, found = self.not_better(), []
        of_what = f"recognises {{}} of the {self.num_images:,} labelled images of {self.split}"
        if self.judged.startswith("mean_"):
            of_what = f"reaches a {column_words(self.judged)} of {{}} on {self.num_images:,} images of {self.split}"
        elif self.judged != KNOWN:
            shots = f"from {max(self.protocol['shots'])} labelled images of each ({self.split})"
            of_what = f"recognises {{}} of the images of {self.protocol['way']} classes {shots}"
        for name, student in self.students.items():
            exported, compared = self.exported(student), "over_baseline" in student
            text = f"Student {name}, as exported, {of_what.format(percent(exported) if exported else DASH)}."
            if name in worse:
                text += f" {worse[name][0].upper()}{worse[name][1:]}."
            elif compared:
                gain = percent(list(student["over_baseline"][self.split].values())[-1], sign="+")
                text += f" That is {gain.replace('%', 'points')} over the same network trained on {self.alone}."
            found.append((text, compared and name not in worse))
        return found

    def markdown(self) -> str:
        """The tables, the sentences and the protocol, as Markdown."""
        first, *others = self.tables().items()
        lines = [self.heading, "", *markdown_table(first[1]), ""]
        for note in (*self.notes(), *self.not_better().values()):
            lines += [note, ""]
        for title, table in others:
            lines += [f"## {title}", "", *markdown_table(table), ""]
        lines += ["## Protocol", "", *(f"- {key}: {value}" for key, value in self.protocol.items())]
        return "\n".join(lines)
