"""Names and layouts of a family's tensors in Hugging Face files: read both ways."""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

# Placeholders of a tensor's name, in the order of our leading axes.
_LEADING = ("{layer}", "{expert}")


@dataclass(frozen=True, slots=True)
class Rule:
    """Correspondence of one of our parameters with a tensor, or with one per layer or expert.

    The methods speak of one such tensor, or of this rule's part of it: shapes and arrays are
    without our leading axes.

    Attributes:
      ours: Dotted path of the parameter, such as `layers.attn.q.w`.
      theirs: Tensor name. `{layer}` and `{expert}` stand for indices along our leading axes, which
        have this order; `{expert}` is never without `{layer}`.
      layout: Axes of the file's tensor, an arrow, our axes: `(n h) d -> n h d`. Letters are those
        of `sharding/axes.py`; a group in brackets is one axis of the file, first letter outermost,
        and `1` an axis of size 1 that ours has not. Leading axes are not written; of a number
        nothing is left but the arrow. Rules that name the same tensor are its parts, in the order
        of the table, and all mark with `+` how these lie along an axis: `(+ f)` one after another,
        `(f +)` in turns.
      layers: Numbers that `{layer}` stands for, along our first axis; from 0 on if absent.
    """

    ours: str
    theirs: str
    layout: str
    layers: range | None = None
    _groups: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _letters: str = field(init=False, repr=False, compare=False)
    _split: tuple[int, str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not re.fullmatch(r"[^{}]*(\{layer\}[^{}]*(\{expert\}[^{}]*)?)?", self.theirs):
            raise ValueError(
                f"tensor name {self.theirs!r} of {self.ours}: expected no braces, {{layer}} once, "
                "or {layer} and then {expert}."
            )
        theirs, _, ours = self.layout.replace(" ", "").partition("->")
        well_formed = re.fullmatch(
            r"([a-z1]|\((\+?[a-z]+|[a-z]+\+)\))*->[a-z]*", f"{theirs}->{ours}"
        )
        marked = [group or letter for group, letter in re.findall(r"\((.+?)\)|(.)", theirs)]
        groups = tuple(group.strip("+1") for group in marked)
        if (
            not well_formed
            or sorted("".join(groups)) != sorted(set(ours))
            or len(set(ours)) < len(ours)
            or theirs.count("+") > 1
        ):
            raise ValueError(
                f"layout {self.layout!r} of {self.ours}: expected the same letters, once each, on "
                "both sides of '->', with groups in brackets and '1' on the left only, and at most "
                "one '+' at the start or end of a group."
            )
        splits = [
            (axis, "+ first" if group[0] == "+" else "+ last")
            for axis, group in enumerate(marked)
            if "+" in group
        ]
        object.__setattr__(self, "_groups", groups)
        object.__setattr__(self, "_letters", ours)
        object.__setattr__(self, "_split", splits[0] if splits else None)

    @property
    def leading(self) -> int:
        """Number of our leading axes along which each index is a tensor of theirs."""
        return sum(name in self.theirs for name in _LEADING)

    @property
    def split(self) -> tuple[int, str] | None:
        """Axis of theirs that other rules share, and `+ first` or `+ last`; None for no `+`."""
        return self._split

    @property
    def rows(self) -> int | None:
        """Axis of ours that is the first axis of theirs; None if that is a group or is shared.

        Of a number it is None, too.
        """
        shared = self._split is not None and self._split[0] == 0
        if shared or not self._groups or len(self._groups[0]) != 1:
            return None
        return self._letters.index(self._groups[0])

    @property
    def matrix(self) -> tuple[int, int] | None:
        """Axes of theirs with outputs and inputs; None unless ours is `[lead…, *out, *in]` of two.

        An axis of theirs before these two is one of our leading axes, such as that of experts.
        """
        if not all(self._groups):
            return None
        lead = "".join(self._groups[:-2])
        axes = len(self._groups) - 2, len(self._groups) - 1
        if axes[0] < 0:
            return None
        for outputs, inputs in (axes, axes[::-1]):
            if self._letters == lead + self._groups[outputs] + self._groups[inputs]:
                return outputs, inputs
        return None

    def sides(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Returns the shape of ours in three: leading axes, outputs and inputs of a `matrix`."""
        outputs, _ = self.matrix or (0, 0)
        lead = sum(map(len, self._groups[:-2]))
        end = lead + len(self._groups[outputs])
        return shape[:lead], shape[lead:end], shape[end:]

    def name(self, index: tuple[int, ...]) -> str:
        """Returns the name of the tensor at an index along our leading axes."""
        name = self.theirs
        for placeholder, number in zip(_LEADING, self.numbers(index), strict=False):
            name = name.replace(placeholder, str(number))
        return name

    def numbers(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the numbers of the layer and the expert at an index along our leading axes."""
        return index if self.layers is None else (self.layers[index[0]], *index[1:])

    def shape_theirs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of their tensor, or of this rule's part, given the shape of ours."""
        sizes = dict(zip(self._letters, shape, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in self._groups)

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns their tensor, or this rule's part of one, seen in our layout: always a view.

        Args:
          tensor: Theirs.
          shape: The shape of ours: it holds the sizes of the letters in a group.
        """
        sizes = dict(zip(self._letters, shape, strict=True))
        written = "".join(self._groups)
        split = tensor.reshape([sizes[letter] for letter in written], copy=False)
        return split.transpose([written.index(letter) for letter in self._letters])

    def in_their_order(self, array: np.ndarray) -> np.ndarray:
        """Returns a view of our array with its axes in the order of theirs, groups still apart."""
        return array.transpose([self._letters.index(letter) for letter in "".join(self._groups)])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns our array in their layout, contiguous: the inverse of `to_ours`."""
        moved = self.in_their_order(array)
        return np.ascontiguousarray(moved).reshape(self.shape_theirs(array.shape))


@dataclass(frozen=True)
class Naming:
    """The way a model's parameters are found in, and written to, Hugging Face files.

    Attributes:
      rules: Names and layouts; rules of parameters that a model does not have are passed over.
      ignored: Regular expressions searched in names: tensors that files may carry, unused.
      copies: `{name: other name}` of tensors that files may carry if they equal the other one, such
        as the head of a model with tied embeddings.
      spellings: Starts of names, and what files may have in their place, such as `transformer.` and
        nothing.
      renamed: Names and layouts of weights in the models that transformers builds, where these
        differ from most files, such as experts that lie in one tensor.
      adapted: Rules of `renamed` whose names adapters have, as PEFT reads them under no others.
      tables: Parameters whose rows are looked up.
      others: Starts of names of tensors beside the model's, such as those of a tower for images or
        of layers that guess further tokens, which are written as they were read.
      alone: Names of the same model where it is no part of a whole; None outside of one.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()
    renamed: tuple[Rule, ...] = ()
    adapted: tuple[Rule, ...] = ()
    tables: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    alone: "Naming | None" = None

    def rules_for(self, names: Collection[str]) -> tuple[Rule, ...]:
        """Returns the rules of files that hold tensors of some names.

        They are those of `renamed` for what a file holds as transformers' models do.
        """

        def first(rule: Rule) -> str:
            return self.as_written(rule.name((0,) * rule.leading), names)

        return self._with(rule for rule in self.renamed if first(rule) in names)

    @property
    def adapter_rules(self) -> tuple[Rule, ...]:
        """The rules by which adapters name and shape what they change."""
        return self._with(self.adapted)

    def _with(self, rules: Iterable[Rule]) -> tuple[Rule, ...]:
        """Returns the rules, with some in place of those of the same parameters."""
        others = {rule.ours: rule for rule in rules}
        return tuple(others.get(rule.ours, rule) for rule in self.rules)

    def is_known(self, name: str) -> bool:
        """Whether a tensor that no rule names may be in a file."""
        ignored = any(re.search(pattern, name) for pattern in self.ignored)
        return name in self.copies or ignored or self.is_other(name)

    def is_other(self, name: str) -> bool:
        """Whether a tensor belongs to a part beside the model."""
        return name.startswith(self.others)

    def as_ours(self, name: str, known: Collection[str]) -> str:
        """Returns the one of the known names that a file may spell so; else the name itself."""
        return _respelt(name, known, ((theirs, ours) for ours, theirs in self.spellings))

    def as_written(self, name: str, known: Collection[str]) -> str:
        """Returns the one of a file's names that stands for a name of ours; else the name itself.

        The inverse of `as_ours`.
        """
        return _respelt(name, known, self.spellings)


def _respelt(name: str, known: Collection[str], starts: Iterable[tuple[str, str]]) -> str:
    """Returns a known name, this one or what another start makes of it; this one if there is none.

    Args:
      name: As one side has it.
      known: Names that the other side has.
      starts: Starts of names on the one side, and on the other.
    """
    if name in known:
        return name
    spelt = (new + name.removeprefix(old) for old, new in starts if name.startswith(old))
    return next((other for other in spelt if other in known), name)


@dataclass(frozen=True, slots=True)
class Part:
    """One of our parameters, or one index of its leading axes, and where theirs holds it.

    Attributes:
      rule: The rule it follows.
      index: Along our leading axes: `()`, `(layer,)` or `(layer, expert)`.
      shape: The shape of ours without the leading axes.
      where: Index into the file's tensor.
    """

    rule: Rule
    index: tuple[int, ...]
    shape: tuple[int, ...]
    where: tuple[slice, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns this part of their whole tensor in our layout.

        It is a view: indexing it touches only the bytes of `tensor` that the index selects, which
        is what makes reading a slice from a file cheap.
        """
        # With the dots a number is a view as well.
        return self.rule.to_ours(tensor[(*self.where, ...)], self.shape)

    def locate(self, index: tuple[slice, ...], whole: tuple[int, ...]) -> tuple[range, ...]:
        """Returns what `index` of ours takes of their tensor, along each axis of theirs.

        Args:
          index: Within this part, without our leading axes.
          whole: The shape of their tensor.

        Raises:
          ValueError: If an axis of theirs is a group of several letters.
        """
        taken = dict(zip(self.rule._letters, index, strict=True))
        if not set(self.rule._groups) <= taken.keys():
            raise ValueError(f"layout {self.rule.layout!r} of {self.rule.ours} has groups.")
        return tuple(
            range(size)[place][taken[letter]]
            for letter, size, place in zip(self.rule._groups, whole, self.where, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of theirs and what of our parameters it holds.

    Attributes:
      name: Name in the file.
      shape: Shape in the file.
      parts: One, unless several rules name it.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def to_theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns our arrays, one for each part, as their contiguous tensor."""
        pieces = [
            part.rule.to_theirs(array) for part, array in zip(self.parts, arrays, strict=True)
        ]
        if len(pieces) == 1:
            return pieces[0]
        joined = np.empty(self.shape, pieces[0].dtype)
        for part, piece in zip(self.parts, pieces, strict=True):
            joined[part.where] = piece
        return joined


def of_stacks(
    rules: Iterable[Rule],
    stacks: Mapping[str, range],
    own: Mapping[str, Iterable[Rule]],
) -> Iterator[Rule]:
    """Yields rules for the layers of each stack in the place of those for layers.

    Args:
      rules: Those whose name has a `{layer}` are for parameters of every stack.
      stacks: Numbers of its layers by the path of each, such as `layers.0`.
      own: Further rules for the layers of a stack.
    """
    of_layers = []
    for rule in rules:
        if "{layer}" in rule.theirs:
            of_layers.append(rule)
        else:
            yield rule
    for path, numbers in stacks.items():
        for rule in (*of_layers, *own.get(path, ())):
            start, _, rest = rule.ours.partition(".")
            is_only = path == start
            yield rule if is_only else replace(rule, ours=f"{path}.{rest}", layers=numbers)


def expand(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """Yields every tensor of theirs that parameters of these shapes consist of.

    Rules for parameters that are absent, such as the head of a tied model, are passed over.

    Raises:
      ValueError: If a parameter has no rule or two, or rules that name one tensor do not share it.
    """
    table: dict[str, Rule] = {}
    sharing: dict[tuple[str, range | None], list[Rule]] = {}
    for rule in rules:
        if rule.ours in table:
            raise ValueError(f"Two rules speak of {rule.ours}.")
        table[rule.ours] = rule
        sharing.setdefault((rule.theirs, rule.layers), []).append(rule)
    if missing := sorted(shapes.keys() - table.keys()):
        raise ValueError(f"No rule says which tensors these parameters are: {', '.join(missing)}.")
    for (theirs, _), parts in sharing.items():
        present = [rule for rule in parts if rule.ours in shapes]
        if not present:
            continue
        if len(present) < len(parts):
            absent = ", ".join(rule.ours for rule in parts if rule.ours not in shapes)
            raise ValueError(f"Parts of {theirs} that the model does not have: {absent}.")
        yield from _expand(parts, [shapes[rule.ours] for rule in parts])


def _expand(rules: list[Rule], shapes: list[tuple[int, ...]]) -> Iterator[Tensor]:
    """Yields the tensors of rules that name the same one."""
    leading = rules[0].leading
    ours = [shape[leading:] for shape in shapes]
    theirs = [rule.shape_theirs(shape) for rule, shape in zip(rules, ours, strict=True)]
    _check_parts(rules, theirs, {shape[:leading] for shape in shapes})
    whole, places = _join(rules[0].split, theirs)
    for index in np.ndindex(shapes[0][:leading]):
        parts = [
            Part(rule, index, shape, place)
            for rule, shape, place in zip(rules, ours, places, strict=True)
        ]
        yield Tensor(rules[0].name(index), whole, tuple(parts))


def _check_parts(
    rules: list[Rule], shapes: list[tuple[int, ...]], leading: set[tuple[int, ...]]
) -> None:
    name, split = rules[0].theirs, rules[0].split
    named_by = ", ".join(rule.ours for rule in rules)
    if {rule.split for rule in rules} != {split} or (split is None) != (len(rules) == 1):
        raise ValueError(
            f"{name} is named by {named_by}: rules that share a tensor, and only these, mark the "
            "same axis of theirs with '+', all at the start of its group or all at its end."
        )
    if len(leading) > 1:
        raise ValueError(f"{name} is named by {named_by}, whose leading axes differ: {leading}.")
    if split is None:
        return
    axis, place = split
    rest = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    sizes = {shape[axis] for shape in shapes}
    if len({len(shape) for shape in shapes}) > 1 or len(rest) > 1:
        raise ValueError(f"{name}: its parts {named_by} differ in other axes: {shapes}.")
    if place == "+ last" and len(sizes) > 1:
        raise ValueError(f"{name}: its parts {named_by} lie in turns but differ in size: {shapes}.")


def _join(
    split: tuple[int, str] | None, shapes: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[slice, ...]]]:
    """Returns the shape of a tensor made of parts, and the place of each."""
    whole = list(shapes[0])
    if split is None:
        return shapes[0], [(slice(None),) * len(whole)]
    axis, place = split
    whole[axis] = sum(shape[axis] for shape in shapes)
    if place == "+ last":
        along = [slice(number, None, len(shapes)) for number in range(len(shapes))]
    else:
        ends = np.cumsum([shape[axis] for shape in shapes]).tolist()
        along = [slice(end - shape[axis], end) for end, shape in zip(ends, shapes, strict=True)]
    before, after = (slice(None),) * axis, (slice(None),) * (len(whole) - axis - 1)
    return tuple(whole), [(*before, part, *after) for part in along]
