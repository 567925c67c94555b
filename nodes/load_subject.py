"""Load Subject: a file of Save Subject -> SUBJECT."""

import dataclasses
import hashlib

from comfy_api.latest import io

from ..moa_core.subjects.subject_file import load_subject
from .host.sockets import CATEGORY, MOA_SUBJECT, SEARCHED
from .host.subject_files import find_subject, subject_names


class MoALoadSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoALoadSubject",
            display_name="Load Subject",
            category=CATEGORY,
            description="Loads a subject that Save Subject has saved: a person without the photo.",
            search_aliases=["import subject", "load person", "load identity", *SEARCHED],
            inputs=[
                io.Combo.Input(
                    "subject_name",
                    options=subject_names(),
                    tooltip="A file in output/moa_subjects, where Save Subject writes, or in models/moa_subjects.",
                ),
                io.String.Input(
                    "word",
                    default="",
                    optional=True,
                    tooltip="The word of your prompt that this person stands for; empty: the one it was saved with.",
                ),
            ],
            outputs=[MOA_SUBJECT.Output(display_name="SUBJECT", tooltip="For MoA Patch Model or Subject Interpolate.")],
        )

    @classmethod
    def validate_inputs(cls, subject_name: str | None) -> bool | str:
        if subject_name is not None:  # None: it comes from another node
            try:
                find_subject(subject_name)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, subject_name: str | None, word: str = "") -> str | float:
        """Of the file's content, so that a file that was replaced is loaded anew."""
        if subject_name is None:
            return float("nan")
        return hashlib.sha256(find_subject(subject_name).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, subject_name: str, word: str = "") -> io.NodeOutput:
        try:
            subject = load_subject(find_subject(subject_name))
        except ValueError as error:
            raise ValueError(f"Load Subject: {error}") from error
        word = word.strip()
        return io.NodeOutput(dataclasses.replace(subject, word=word) if word else subject)
