"""Rewards: how good an answer's pictures are, as one number.

::

    reward.py   what a reward is, and what is asked of its numbers
    scene.py    ``scene``: how much of a described scene its picture shows
    find.py     a reward from its name

A reward is a function of the prompt's record, as it stands in the file of prompts, and of the
answer's pictures; larger is better. Those that come with emu35 have a name, and anybody's own is
named ``package.module:function``::

    def brightness(record, pictures):
        return float(sum(picture.mean() for picture in pictures)) / 255

Whoever asks for a reward checks every record first (:meth:`NamedReward.problems`), so that a record
without what the reward needs is found before a model is loaded. No number is ever made up: a reward
that fails, or gives what is no number, ends the run with its name and the prompt's.
"""
