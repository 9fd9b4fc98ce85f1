"""The tensors of a student: which there are, and the pass that converts or copies each from the source."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.contracts.family import Family
from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers
from kvfold.contracts.site import QUERIES, WHOLE, Site
from kvfold.convert.crew import CREW, Crew
from kvfold.disk.checkpoint import Checkpoint, TensorSpec, Writer, natural
from kvfold.disk.finite import check_finite
from kvfold.disk.output import damaged, read_json, write_json
from kvfold.disk.shards import digest
from kvfold.predict.student_config import student_family
from kvfold.progress import Progress, task

if TYPE_CHECKING:
    from torch import Tensor

CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """A conversion with resolved settings: the groups of sites, and every tensor of the student."""

    source: Checkpoint
    method: Method[Any]
    config: Any
    answers: Answers
    student: Student
    family: Family  # of the student
    groups: Sequence[tuple[Site, ...]]
    specs: Mapping[str, TensorSpec]
    gone: Sequence[str]  # tensors of the source that belong to attentions that the student does not have
    notes: Path

    @classmethod
    def plan(
        cls, source: Checkpoint, method: Method[Any], config: Any, answers: Answers, dtype: str, notes: Path
    ) -> Job:
        """Lay out the student's tensors, from shapes alone."""
        groups, student = method.groups(config, source.shape), method.student(config, source.shape)
        family = student_family(source.family, student)
        gone = source.gone(student.shape)
        specs = {name: source.spec(name) for name in source.names() if name not in gone}
        for site in (site for group in groups for site in group):
            before, after = source.shape.sites[site], student.shape.sites[site]
            kinds: dict[str, str] = {}
            for name, roles in source.family.stored(site, before).items():
                kinds |= dict.fromkeys(roles, specs.pop(name).dtype)
            for name, roles in family.stored(site, after).items():
                kind = "int64" if roles[0] in WHOLE else kinds.get(roles[0], kinds["q"])
                specs[name] = TensorSpec(family.form(after, roles), kind)
        if dtype != "source":
            specs = {
                name: TensorSpec(spec.shape, dtype if spec.floating else spec.dtype) for name, spec in specs.items()
            }
        ordered = {name: specs[name] for name in sorted(specs, key=natural)}
        return cls(source, method, config, answers, student, family, groups, ordered, sorted(gone), notes)

    def run(self, writer: Writer, progress: Progress) -> None:
        """Write the tensors that are missing, in the student's order: this thread converts, others copy."""
        import torch

        stored, sites = self.family.stored, self.student.shape.sites
        groups = {name: group for group in self.groups for site in group for name in stored(site, sites[site])}
        left = [name for name in self.specs if name not in writer.digests]
        size = sum(self.specs[name].nbytes for name in left)
        done: set[tuple[Site, ...]] = set()
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, min(before, CORES - CREW)))  # more threads than cores wait for each other
        try:
            with task(progress, "converting", size, "bytes"), Crew(progress) as crew:
                for name in self.gone:
                    crew.give(self._note, name, self.source.read(name))
                for name in left:
                    group = groups.get(name)
                    if group is None:
                        crew.give(self._copy, name, self.source.read(name), writer)
                    elif group not in done:
                        done.add(group)
                        self._convert(group, writer, crew, progress)
        finally:
            torch.set_num_threads(before)

    def _convert(self, group: Sequence[Site], writer: Writer, crew: Crew, progress: Progress) -> None:
        """Convert one group of sites. Tensors that the method returns as they are are copied."""
        family, source = self.source.family, self.source
        given = {site: replace(source.roles(site), dtype=self._dtype(site)) for site in group}
        for site, tensors in given.items():
            for role, tensor in tensors.roles.items():
                check_finite(tensor, "float64", family.tensor(site, role), source.path)
        converted, measured = self.method.fold(given, self.answers, self.config)
        if measured:  # before the tensors: continued work does not convert again what is written
            write_json(self.notes, {**self.found(), **{str(site): found for site, found in measured.items()}})
        for site in group:
            old, new, attention = given[site].roles, converted[site], self.student.shape.sites[site]
            before, after = family.stored(site, source.shape.sites[site]), self.family.stored(site, attention)
            same = {name for name, held in before.items() if all(new.get(role) is old[role] for role in held)}
            for name in before.keys() - same:
                crew.give(self._note, name, source.read(name))
            for name, held in after.items():
                if name in writer.digests:
                    continue
                if name in same and before[name] == held:
                    crew.give(self._copy, name, source.read(name), writer)
                else:
                    writer.write(name, self.family.joined(attention, {role: new[role] for role in held}))
                    progress.advance(self.specs[name].nbytes)

    def _dtype(self, site: Site) -> str:
        """The format of a site's tensors in the student."""
        return self.specs[self.family.tensor(site, "o")].dtype

    def found(self) -> dict[str, Any]:
        """The method's measurements of the sites that are converted, by continued work too."""
        if not self.notes.exists():
            return {}
        found = read_json(self.notes)
        if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
            raise damaged(self.notes)
        return found

    def queries(self) -> dict[Site, list[int]]:
        """The source's query heads in their new order, at the sites where the method reordered them."""
        found = self.found()
        measured = {site: found.get(str(site), {}) for site in self.source.shape.sites}
        return {site: each[QUERIES] for site, each in measured.items() if QUERIES in each}

    def _copy(self, name: str, tensor: Tensor, writer: Writer) -> int:
        """Write a tensor of the source. Unless its dtype changes, one hash serves source and student."""
        written = writer.write(name, tensor)
        same = self.specs[name].dtype == self.source.spec(name).dtype
        self.source.digests[name] = written if same else digest(tensor)
        return self.specs[name].nbytes

    def _note(self, name: str, tensor: Tensor) -> int:
        """Hash a tensor of the source that is not in the student."""
        if name not in self.source.digests:
            self.source.digests[name] = digest(tensor)
        return 0
