"""Shows the stages that a run would do and what they take, and checks what can be known before any work."""

import os
from contextlib import suppress

from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.check_data import Counts
from dpkd.stages.plan import dataset_url, plan_run, stages_of, with_origin


def plan(settings: Settings, *, fast: bool = False) -> None:
    """Logs each stage and its status.

    Unless `fast`, it lists the source, if the images are not packed, builds every network, and logs what the stages
    that are left take. Raises `UserError` with the key, its value and the way out.
    """
    folder = RunFolder(settings.run.dir)
    settings = with_origin(settings, folder)
    left = plan_run(settings, folder, stages_of(settings))
    if fast or not left:
        return
    # not at the top: `--fast` loads neither torch nor pyarrow
    import torch  # noqa: PLC0415

    from dpkd.backends.local_pool import LocalPool  # noqa: PLC0415
    from dpkd.data.image_headers import BrokenImage  # noqa: PLC0415
    from dpkd.data.shards import Dataset  # noqa: PLC0415
    from dpkd.data.sources import find  # noqa: PLC0415
    from dpkd.stages.check_networks import check_networks  # noqa: PLC0415
    from dpkd.stages.estimate import NUM_IMAGES, log_needs  # noqa: PLC0415
    from dpkd.stages.pack import check_plan, plan_shards  # noqa: PLC0415

    url, data = dataset_url(folder, settings.data), settings.data
    if settings.launcher.threads is not None:
        torch.set_num_threads(settings.launcher.threads)
    if "pack" in left and data.source is not None:
        contents = find(data.source, pool=LocalPool(settings.launcher.pool_workers or os.cpu_count() or 1))
        shards = plan_shards(contents, data, seed=settings.run.seed, destination=url)
        check_plan(shards, settings=settings, left=left)
        blobs = [sample.record.image for job in shards.jobs for sample in job.samples]
        images = []
        for blob in blobs[:: -(-len(blobs) // NUM_IMAGES)]:
            with suppress(BrokenImage):  # packing counts it
                images.append(blob.read())
        counts: Counts = shards.counts
        to_pack_bytes = sum(max(0, blob.size) for blob in blobs)
    else:
        dataset = Dataset.open(url)
        split = dataset.split(data.train)
        images = [split.read(i).image for i in range(min(NUM_IMAGES, split.num_samples))]
        counts, to_pack_bytes = dataset.manifest.splits, 0
    log_needs(
        settings,
        left,
        check_networks(settings, left),
        images=images,
        num_images=sum(count.num_samples for count in counts.values()),
        num_training=counts[data.train].num_samples,
        to_pack_bytes=to_pack_bytes,
    )
