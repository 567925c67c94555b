"""Save Subject: SUBJECT -> a file that holds the person without the photo."""

import os

import folder_paths
from comfy_api.latest import io, ui

from ..moa_core.subjects.subject import Subject
from ..moa_core.subjects.subject_file import save_subject
from .experts.lora_file import LoRAs
from .host.sockets import CATEGORY, MOA_SUBJECT
from .host.subject_files import check_prefix, new_subject_path


class MoASaveSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoASaveSubject",
            display_name="Save Subject",
            category=CATEGORY,
            description=(
                "Saves a subject as a small file in the output folder, to be used again or shared without the photo. "
                "Load Subject reads it, for the MoA it was encoded with."
            ),
            search_aliases=["export subject", "save person", "save identity"],
            inputs=[
                MOA_SUBJECT.Input("subject", tooltip="From Subject Encoder or Subject Interpolate."),
                io.String.Input(
                    "filename_prefix",
                    default="subject",
                    tooltip="Name of the file in output/moa_subjects; a number follows. family/ann makes a folder.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        if filename_prefix is not None:  # None: it comes from another node
            try:
                check_prefix(filename_prefix)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def execute(cls, subject: Subject, filename_prefix: str) -> io.NodeOutput:
        if isinstance(subject.adapter, LoRAs):
            raise ValueError(
                f"Save Subject: '{subject.name}' is a LoRA, and all of it is in its own file. Share that file, and its "
                "trigger"
            )
        try:
            path = new_subject_path(filename_prefix)
            save_subject(subject, path)
        except ValueError as error:
            raise ValueError(f"Save Subject: {error}") from error
        folder = os.path.relpath(path.parent, folder_paths.get_output_directory())
        return io.NodeOutput(ui={"subjects": [ui.SavedResult(path.name, folder, io.FolderType.output)]})
