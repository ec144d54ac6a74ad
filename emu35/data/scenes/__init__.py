"""Scenes: pictures whose exact content is known, so that what a model learned can be measured.

A *scene* is one to three plain shapes on a plain background. It exists in three forms: a
description (:mod:`~emu35.data.scenes.describe`), a picture (:mod:`~emu35.data.scenes.render`) and
a caption in English or Chinese (:mod:`~emu35.data.scenes.captions`). The way back from a picture,
be it rendered or generated, is :mod:`~emu35.data.scenes.verify`: it finds the objects by
segmentation and compares them with the description, without any learned part. Accuracy against
chance is thus a number that a model cannot talk its way into.

Train and held-out scenes are disjoint by construction: the hash of a description decides its
side (:func:`~emu35.data.scenes.describe.split_of`), and a held-out caption always names every
attribute that the hash covers. No caption that a model is tested on can occur in what it was
trained on. :mod:`~emu35.data.scenes.corpus` writes both sides as webdataset tars.

Pictures of words (:mod:`~emu35.data.scenes.words`) are for what no segmentation reads back: optical
character recognition judges them. Their sides are disjoint by what is written.
"""
