"""The settings of a run: composed from the parts, checked across them before any work starts. Loads no heavy package."""

from dpkd.section import Section
from dpkd.stages.settings import (
    DataSettings,
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    LauncherSettings,
    PrepareSettings,
    RunSettings,
    TeachSettings,
)


class Settings(Section):
    """Everything a run was asked for; `runs/<name>/settings.yaml` holds it resolved."""

    run: RunSettings = RunSettings()
    launcher: LauncherSettings = LauncherSettings()
    data: DataSettings
    prepare: PrepareSettings = PrepareSettings()
    teach: TeachSettings
    distill: DistillSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()
