"""A run that starts from another one (`run.from`): with its packed images, prior maps and trained teachers.

The other run is only read: images and maps stay in their place, and the new run copies the saved teachers. Its record
of stages names the other run.
"""

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.priors.store import MANIFEST_NAME
from dpkd.run.folder import RunFolder
from dpkd.settings import PrepareSettings, Settings
from dpkd.stages.plan import POOL_STAGES, stage_inputs, stages_of


def with_origin(settings: Settings, folder: RunFolder) -> Settings:
    """The settings with the images and maps of `run.from`, whose finished stages the folder borrows.

    Prior maps that this run does not use may be among them. Raises `UserError` with the keys if a stage of the other
    run has other settings, or is not done before its maps are.
    """
    place = settings.run.from_
    if place is None:
        return settings
    own, origin = folder.stages(), RunFolder(place)
    records = origin.stages() | own
    for stage in POOL_STAGES:
        if records.get(stage, {}).get("status") != "done":
            raise UserError(
                f"run.from={place}: its stage {stage} is not done: name a run with packed and prepared images"
            )
    prepared = PrepareSettings.model_validate(records["prepare"]["given"]["prepare"])
    wanted = settings.prepare.sealed()
    if missing := [prior.name for prior in wanted.chosen if prior not in prepared.chosen]:
        raise UserError(
            f"run.from={place} has no prior map {', '.join(missing)} with these settings (it has "
            f"{', '.join(prior.name for prior in prepared.chosen) or 'none'}): use those, or leave run.from out"
        )
    (manifest,) = records["prepare"]["made"]
    manifest = manifest if storage.local_path(manifest) is None else str(origin.path.absolute() / manifest)
    shards = manifest.removesuffix(f"/priors/{prepared.name}/{MANIFEST_NAME}")
    if settings.data.shards not in (None, shards):
        raise UserError(
            f"data.shards={settings.data.shards} is not {shards} of run.from={place}: leave one of them out"
        )
    data = settings.data.model_copy(update={"shards": shards})
    settings = settings.model_copy(update={"data": data, "prepare": prepared})
    lacking = [stage for stage in stages_of(settings, [*POOL_STAGES, "teach"]) if stage not in own]
    way_out = f"Take the values of run.from={place}, or leave run.from out."
    folder.borrow(origin, {stage: stage_inputs(stage, settings) for stage in lacking}, way_out=way_out)
    return settings
