"""Rewards: how good an answer is, as numbers on one scale.

::

    sample.py      what a reward is shown, and what it may answer
    call.py        how a call of a reward may fail
    build.py       rewards from their configuration; the one table of kinds
    named.py       one reward for a command, which its failure ends

    scene.py       how much of a described scene its picture shows
    function.py    anybody's own
    ocr.py, ocr_layout.py, faces.py, identity.py, aesthetics.py, aesthetics_model.py,
    similarity.py, preservation.py: judged on this machine, see the table below
    reader.py, text_fidelity.py, boxes.py, matching.py   what those of words share
    face_detector.py, image_text.py, lend.py, optional.py   models of theirs
    judge.py       a vision language model gives one number, for pictures or whole narratives
    similarity_endpoint.py, similarity_server.py   image-text similarity, asked for and served
    http.py        JSON to a server and back, its failures told apart

    pool.py        rewards at work beside generation: workers, timeouts, repetition
    lane.py        the queue of one reward
    counts.py      what a pool did, and how much of its time was hidden
    scale.py       scores of all rewards in [1, 10], and their weighted mean
    missing.py     answers without a total, and whether the run goes on
    statistics.py  means, spread, clamp rate and drift, over ranks and resumptions

A reward is shown samples (the prompt's record, the answer's texts and pictures) and gives one score
for each in a range of its own. Anybody's own is named ``package.module:function``::

    def brightness(record, pictures):
        return float(sum(picture.mean() for picture in pictures)) / 255

Whoever asks for a reward checks every record first (``problems``), so that a record without what
the reward needs is found before a model is loaded. No number is ever made up: what cannot be judged
is :class:`~emu35.rewards.sample.Unscored` and says why, and so is what a reward failed at, after as
many repetitions as are configured.

The paper (section 4.2.1) has general rewards, rewards of single tasks, and maps each to [1, 10]:

=====================================  ===============================  ======================
paper                                  kind                             needs of the record
=====================================  ===============================  ======================
CLIP-based image-text similarity       similarity, similarity_endpoint  (caption)
VLM-based alignment accuracy           judge
aesthetic scorers                      aesthetics (proxies),
                                       aesthetics_model
OCR-based text fidelity                ocr                              text
layout-based text fidelity             ocr_layout                       layout
face detection                         faces                            faces
face identification (X2I)              identity                         images
VLM-based consistency of narratives    consistency
(ours) unedited parts of an edit       preservation                     images (region or mask)
(ours) described scenes                scene                            scene, expect.scenes
=====================================  ===============================  ======================

The paper names no models. The local ones are: rapidocr's PP-OCRv6 (its wheel has them), opencv's
cascade or YuNet for faces, and for the rest whatever checkpoint a configuration points to. Nothing
is ever fetched. A model that only one thread at a time may use is lent to it (``lend.py``).
"""
