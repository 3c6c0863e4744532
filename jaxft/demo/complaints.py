"""Patients' words by clinic department: the vocabulary of the demo's texts and cases.

A wording is a clause with marks for whoever speaks: `{I}`, `{my}`, `{me}` and any verb of theirs
(`{have}`, `{am}`, `{cough}`), so that one clause serves as "I have hives" and "she has hives".
Clauses under `train` become training cases, those under `held_out` become held-out cases. The two
share no word, apart from function words ("my", "have", "too"); what connects them is the prose of
`corpus.py`, where patients use both.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Department:
    """A label of the task and how its patients put their complaints."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    persons: tuple[str, ...] = ("she", "he")

    @property
    def wordings(self) -> tuple[str, ...]:
        """All of them, as the prose of the base model uses them."""
        return self.train + self.held_out


_PRONOUNS = {
    "I": {"I": "I", "my": "my", "me": "me"},
    "you": {"I": "you", "my": "your", "me": "you"},
    "she": {"I": "she", "my": "her", "me": "her"},
    "he": {"I": "he", "my": "his", "me": "him"},
}
_IRREGULAR = {"have": "has", "am": "is", "go": "goes", "pass": "passes", "cry": "cries"}
_IRREGULAR |= {"worry": "worries"}


def speak(wording: str, person: str) -> str:
    """Returns the clause as "I" say it, or as it is said of "you", "she" or "he"."""

    def fill(match: re.Match[str]) -> str:
        word = match.group(1)
        if word in _PRONOUNS[person]:
            return _PRONOUNS[person][word]
        if person == "you":
            return "are" if word == "am" else word
        if person == "I":
            return word
        return _IRREGULAR.get(word, f"{word}s")

    return re.sub(r"\{(\w+)\}", fill, wording)


DEPARTMENTS = (
    Department(
        "Dermatology",
        train=(
            "{my} skin itches",
            "{I} {have} a red rash on {my} arm",
            "there are small spots on {my} back",
            "the skin of {my} hands is dry and flaky",
            "{I} {keep} scratching {my} leg",
            "a mole on {my} shoulder has changed colour",
            "pimples are all over {my} face",
            "the skin peels around {my} fingers",
            "{I} {have} a rough patch on {my} neck",
            "{my} skin is sore and itchy",
        ),
        held_out=(
            "{I} {have} hives",
            "blisters cover {me} everywhere",
            "{my} eczema is bad again",
            "{my} acne is worse than before",
            "{I} {have} warts",
            "prickly welts come and go",
            "{I} {have} scabs",
            "{my} psoriasis is bad",
        ),
    ),
    Department(
        "Cardiology",
        train=(
            "{my} heart beats too fast",
            "{I} {feel} a pressure in {my} chest",
            "{my} pulse jumps",
            "{my} heart skips a beat",
            "{I} {have} a tight band around {my} chest",
            "{my} heart pounds when {I} {rest}",
            "{my} blood pressure is high",
            "{my} heart races at night",
            "the pulse in {my} neck is uneven",
            "there is a squeezing pain in {my} chest that spreads to {my} left arm",
        ),
        held_out=(
            "{I} {have} palpitations",
            "there is a fluttering under {my} ribs",
            "{my} arteries are narrow",
            "{my} angina is bad again",
            "{my} cholesterol is too much",
            "{my} pacemaker needs a check",
            "{I} {have} a murmur from a leaky valve",
            "{my} rhythm is irregular",
        ),
    ),
    Department(
        "Orthopaedics",
        train=(
            "{my} knee is swollen",
            "{my} shoulder is stiff",
            "{I} cannot bend {my} elbow",
            "{I} {have} twisted {my} ankle",
            "{my} lower back aches when {I} {lift} things",
            "{my} hip hurts when {I} {walk}",
            "a bone in {my} foot is broken",
            "{my} joints creak and ache",
            "{I} {have} a sharp pain in {my} wrist",
            "{I} cannot put weight on {my} leg",
        ),
        held_out=(
            "{I} {have} a sprain",
            "{my} ligament is torn",
            "{I} {have} a fracture",
            "{my} tendon snapped",
            "{my} spine is crooked",
            "a disc has slipped",
            "{my} arthritis is bad again",
            "{I} {limp}",
        ),
    ),
    Department(
        "Ophthalmology",
        train=(
            "{my} eyes are red",
            "{I} {see} everything double",
            "{my} sight is blurred",
            "{my} left eye waters",
            "bright light hurts {my} eyes",
            "{I} cannot read small print",
            "{my} right eyelid is swollen",
            "{I} {see} dark dots before {my} eyes",
            "there is sand in {my} eye and it will not open",
            "{my} eye is sticky in the morning",
        ),
        held_out=(
            "{my} vision is cloudy",
            "{I} {have} a stye",
            "{I} {have} a cataract",
            "{my} pupil is too large",
            "{my} lashes grow inward",
            "{my} glasses do not help any more",
            "floaters drift by all day",
            "{I} {squint} at signs",
        ),
    ),
    Department(
        "Dentistry",
        train=(
            "{my} tooth hurts",
            "{my} gums bleed",
            "a filling fell out",
            "{my} jaw aches when {I} {chew}",
            "two of {my} teeth are loose",
            "sweet things sting {my} tooth",
            "a front tooth is chipped",
            "{my} back tooth throbs at night",
            "{my} gums are swollen and red",
            "ice makes {my} teeth ache",
        ),
        held_out=(
            "{I} {have} a cavity",
            "{my} molar is cracked",
            "{my} crown came off",
            "{my} dentures rub",
            "{my} braces poke",
            "an incisor wobbles",
            "{my} enamel wears away",
            "{my} canine has a hole",
        ),
    ),
    Department(
        "Ear, nose and throat",
        train=(
            "{my} right ear is blocked",
            "{I} cannot hear well",
            "{my} nose bleeds",
            "{my} throat is sore",
            "{my} nose is stuffed",
            "{my} voice is hoarse",
            "there is a ringing in {my} ears",
            "it hurts to swallow",
            "{my} ear aches and drips",
            "{I} {have} lost {my} sense of smell",
        ),
        held_out=(
            "{my} tonsils are large",
            "{my} sinuses are full",
            "{my} nostrils are clogged",
            "{I} {have} tinnitus",
            "{my} eardrum burst",
            "{I} {have} too much earwax",
            "{I} {am} going deaf",
            "{my} laryngitis is bad",
        ),
    ),
    Department(
        "Gastroenterology",
        train=(
            "{my} stomach hurts after meals",
            "{I} {feel} sick after eating",
            "{my} belly is swollen and hard",
            "{I} {keep} throwing up",
            "food comes back up",
            "{I} {have} cramps in {my} belly",
            "{I} {have} loose stools",
            "{I} cannot keep food down",
            "{my} stomach burns",
            "{I} {have} no appetite and {my} stomach turns",
        ),
        held_out=(
            "{I} {have} nausea",
            "{I} {vomit} every day",
            "{I} {have} diarrhoea",
            "{my} bowels are slow",
            "{I} {am} constipated",
            "{my} indigestion is bad again",
            "{I} {have} gallstones",
            "{I} {feel} bloated and gassy",
        ),
    ),
    Department(
        "Neurology",
        train=(
            "{I} {have} a splitting headache",
            "{my} left hand is numb",
            "{my} fingers tingle",
            "{I} {have} fits",
            "{my} right hand shakes",
            "{I} {forget} words",
            "the room spins and {I} {feel} dizzy",
            "one side of {my} face droops",
            "{my} head hurts on one side",
            "{I} {faint} without warning",
        ),
        held_out=(
            "{I} {have} a migraine",
            "{I} {have} seizures",
            "{my} memory fails",
            "{I} {have} a tremor",
            "{my} vertigo is bad again",
            "{I} {have} a concussion",
            "{my} epilepsy is worse",
            "{I} {have} pins and needles",
        ),
    ),
    Department(
        "Urology",
        train=(
            "it burns when {I} {pass} water",
            "{I} {go} to the toilet all the time",
            "{my} bladder hurts",
            "{I} cannot hold {my} water",
            "{my} urine is dark",
            "there is blood in {my} urine",
            "{I} {get} up for the toilet at night",
            "{my} stream is weak",
            "{my} bladder never feels empty",
            "{my} urine smells strong",
        ),
        held_out=(
            "{I} {have} kidney stones",
            "{I} {leak} when {I} {laugh}",
            "{I} {have} cystitis",
            "{I} {pee} too much",
            "{my} catheter is out",
            "{my} incontinence is worse",
            "{I} {wet} the bed",
            "{my} kidneys are bad",
        ),
    ),
    Department(
        "Pulmonology",
        train=(
            "{I} {cough} all night",
            "{I} {am} short of breath",
            "{I} {wheeze} when {I} {run}",
            "{my} lungs feel tight",
            "{I} {bring} up phlegm",
            "{I} cannot breathe deeply",
            "{my} breath whistles",
            "{I} {have} a dry cough",
            "{my} lungs rattle",
            "{I} {cough} up something green",
        ),
        held_out=(
            "{I} {have} asthma",
            "{I} {pant} on the stairs",
            "{my} inhaler does not help any more",
            "{my} bronchitis is bad again",
            "{I} {have} too much mucus",
            "{I} {gasp} for air",
            "{I} {have} pneumonia",
            "{my} airways are narrow",
        ),
    ),
    Department(
        "Psychiatry",
        train=(
            "{I} {feel} sad all day",
            "{I} {worry} about everything",
            "{I} cannot sleep because of {my} thoughts",
            "{I} {am} afraid of people",
            "{I} {have} lost all joy",
            "{I} {cry} without a reason",
            "{my} thoughts go in circles",
            "{I} cannot calm down",
            "nothing makes {me} happy",
            "{I} {have} fears that {I} cannot explain",
        ),
        held_out=(
            "{I} {feel} hopeless",
            "{I} {have} panic",
            "{I} {am} depressed",
            "{my} insomnia is bad again",
            "{my} mood swings are worse",
            "{I} {am} anxious",
            "{I} {have} nightmares",
            "{I} {feel} lonely",
        ),
    ),
    Department(
        "Maternity",
        train=(
            "{I} {am} pregnant",
            "{my} baby kicks less",
            "{my} due date is near",
            "{my} period is two months late",
            "{I} {am} expecting twins",
            "{my} pregnancy test was positive",
            "{my} unborn baby lies the wrong way",
            "{I} {am} in the last month with {my} baby",
            "{my} water broke before the birth",
            "{I} {have} morning sickness",
        ),
        held_out=(
            "{I} {have} contractions",
            "{I} {feel} movements in {my} womb",
            "{I} {have} labour pains",
            "{I} {need} a midwife",
            "{I} {need} an antenatal check",
            "{my} bump grows",
            "{I} {want} to deliver soon",
            "{my} placenta is low",
        ),
        persons=("she",),
    ),
)
"""The order fixes what the generators write."""

NAMES = tuple(department.name for department in DEPARTMENTS)


def keywords(department: Department) -> list[str]:
    """Returns the words that only this department's patients use, sorted."""
    return sorted(
        _words(department).difference(*(_words(d) for d in DEPARTMENTS if d is not department))
    )


def _words(department: Department) -> set[str]:
    return {word for wording in department.wordings for word in speak(wording, "I").split()}
