"""Shows the stages that a run would do, and checks what can be known before any work."""

from functools import partial

from dpkd.errors import UserError
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.plan import plan_run, stages_of


def plan(settings: Settings, *, fast: bool = False) -> None:
    """Logs each stage and its status, and, unless `fast`, builds every network without weights.

    Raises `UserError` with the key, its value and the way out.
    """
    plan_run(settings, RunFolder(settings.run.dir), stages_of(settings))
    if not fast:
        check_networks(settings)


def check_networks(settings: Settings) -> None:
    """Raises `UserError` with the key of a network that cannot be built or does not run on images of this size."""
    # not at the top: `--fast` loads no torch
    import torch  # noqa: PLC0415

    from dpkd.models.backbone import Backbone  # noqa: PLC0415

    for key, network in settings.networks.items():
        model = network.model.model_copy(update={"pretrained": False})
        # the number of classes is not known before packing; a network that never learns has none
        num_classes = 2 if network.objectives else 0
        build = partial(Backbone, model, num_classes=num_classes, image_size=settings.data.image_size)
        try:
            try:
                with torch.device("meta"):  # shapes without memory
                    build()
            except UserError:  # also for a model that reads its weights while it is built: only real ones can tell
                build()
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
