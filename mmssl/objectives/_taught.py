"""What tasks have in common whose momentum teacher leaves the run in place of the encoder that it follows."""

from __future__ import annotations

from typing import cast

from torch import nn

from mmssl.encoders.base import Encoder
from mmssl.modules.teacher import Teacher, without_dropout
from mmssl.objectives.base import Objective, Step


class Taught(Objective):
    """A task of one encoder and the teacher that follows it; `begin_teaching` is called when all modules are there.

    Attributes:
        name: of the encoder.
        teacher: of all that `_student` holds.
    """

    name: str
    teacher: Teacher

    def begin_teaching(self) -> None:
        """Make the teacher, which drops nothing."""
        self.teacher = Teacher(self._student())
        without_dropout(self.teacher)

    def _student(self) -> dict[str, nn.Module]:
        """Name -> module that the teacher copies and follows, of which `encoder` is one."""
        return {"encoder": self.encoder(self.name)}

    @property
    def exported(self) -> dict[str, Encoder]:
        """The teacher's encoder in place of the student's."""
        return super().exported | {self.name: self._taught}

    @property
    def _taught(self) -> Encoder:
        return cast(Encoder, self.teacher["encoder"])

    def before_step(self, step: Step) -> None:
        """See `Teacher.begin`."""
        self.teacher.begin(step.number, self._student())
