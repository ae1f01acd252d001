"""The model card of an exported student: its description, its measured numbers, and its use without dpkd."""

from typing import Any

from dpkd.report.figures import DASH, Evaluation, count_words, markdown_table, percent, rate_words

FRONT_MATTER = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- image-feature-extraction
- few-shot
---
"""

USAGE = """\
```python
import timm, torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model), is_training=False)
image = transform(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB"))[None]
with torch.no_grad():
    features = model.forward_features(image)
    embedding = model.forward_head(features, pre_logits=True)
    probability = model(image).{activation}[0].tolist()
print(dict(zip(model.pretrained_cfg["label_names"], probability)))
```
"""

ADAPTED = """\
The network of `{export}` as a classifier of new classes, made from a few labelled images by `dpkd adapt`.
Method `{method}`: {certainty}.

The interval is that of Clopper and Pearson for new images that are drawn like the shots, with classes as frequent as
among them. Each shot was classified by a model that learnt from the others.

{table}

`model.onnx` gives embedding and logits of normalised images, for any batch size.
"""

FIGURE_GROUND = """\
## Figure-ground pooling

This student was trained with an embedding that weighs its patch features f by a `{prior}` map S in [0, 1]:
`w = S / (mean S + {floor}) + 0.001`, then the model's head on Σ w f / Σ w instead of the plain mean. A timm model has
no such input, so `forward_head` above uses the plain mean; the table gives both. `model.onnx`, if it is beside this
card, takes the map as its second input, `weight`.
"""


def model_card(
    name: str,
    *,
    evaluation: dict[str, Any] | None,
    spec: dict[str, Any],
    onnx_difference: float | None,
) -> str:
    """The card as Markdown with the Hugging Face front matter; with numbers if there is an `evaluation.json`."""
    size, pooling = spec["image_size"], spec["model"]["pooling"]
    parts = [FRONT_MATTER, f"# {name}\n"]
    if evaluation is not None:
        table = evaluation["students"][name]
        teachers = " and ".join(
            f"a `{teacher['model']}` of {count_words(teacher['parameters'])} parameters"
            for teacher in evaluation["teachers"].values()
        )
        kinds = "labels" if spec["multi_label"] else "classes"
        description = (
            f"A `{spec['model']['name']}` of {count_words(table['parameters'])} parameters for {size} px images and "
            f"{len(spec['classes'])} {kinds}, distilled with dpkd from {teachers or 'no teacher'}.\n"
        )
        parts += [description, "## Numbers\n", *_numbers(table, evaluation)]
    mean, std = (", ".join(f"{value:.4f}" for value in spec[key]) for key in ("mean", "std"))
    preprocessing = (
        f"Preprocessing: the largest centred square, resized to {size} x {size}, RGB in 0 … 1, minus mean ({mean}), "
        f"divided by standard deviation ({std}); `config.json` holds it for timm.\n"
    )
    activation = "sigmoid()" if spec["multi_label"] else "softmax(1)"
    parts += ["## Use\n", USAGE.format(folder=name, activation=activation), preprocessing]
    if onnx_difference is not None:
        parts.append(
            "`model.onnx` takes normalised images of any batch size; its outputs differ from PyTorch's by at most "
            f"{onnx_difference:.1g} of the largest.\n"
        )
    if pooling["kind"] == "figure_ground":
        parts.append(FIGURE_GROUND.format(**pooling))
    return "\n".join(parts)


def adapted_card(name: str, card: dict[str, Any]) -> str:
    """The card of a folder that `dpkd adapt` has written, from its `adapt.json`."""
    rows = [["class", "shots"], *([each, str(len(files))] for each, files in card["classes"].items())]
    made = ADAPTED.format(**card, table="\n".join(markdown_table(rows)))
    return "\n".join([FRONT_MATTER, f"# {name}\n", made, USAGE.format(folder=name, activation="softmax(1)")])


def _numbers(table: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """The table of accuracies, and the conditions of their measurement."""
    protocol, has_map = evaluation["protocol"], "plain_pooling" in table
    kinds = {
        "scores": "with its prior map" if has_map else "accuracy",
        "plain_pooling": "as timm pools",
        "over_baseline": f"gain over the same network on {Evaluation(evaluation).alone}",
    }
    keys = list(dict.fromkeys(key for scores in table["scores"].values() for key in scores))
    rows = [["", "split", *(key.replace("_", " ") for key in keys)]]
    for kind, title in kinds.items():
        sign = "+" if kind == "over_baseline" else ""
        for split, scores in table.get(kind, {}).items():
            cells = [percent(scores[key], sign=sign) if key in scores else DASH for key in keys]
            rows.append([title, split, *cells])
    conditions = "Known classes: " + ", ".join(
        f"{n:,} images of {split}" for split, n in evaluation["labelled"].items()
    )
    if "labels" in protocol:
        conditions = "Mean over labels; 95 % intervals by the bootstrap over images"
    if "way" in protocol:
        conditions = (
            f"Mean and 95 % interval over {protocol['episodes']:,} episodes of {protocol['way']} classes with "
            f"{protocol['queries']} queries each; {protocol['classifier'].replace('_', ' ')} on embeddings after "
            f"`{protocol['transform']}`, seed {protocol['seed']}"
        )
    speed = f"{rate_words(table['images_per_s'])} images/s on {evaluation['device']}, decoding not counted"
    conditions = f"{conditions}. {speed}.\n"
    return ["\n".join(markdown_table(rows)) + "\n", conditions]
