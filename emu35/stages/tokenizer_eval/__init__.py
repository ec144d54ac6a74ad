"""What image tokenizers lose of pictures: ``stage=tokenizer_eval``.

Every picture is cut to a square of each resolution, encoded and decoded by each tokenizer, and
compared with what went in. Pixels and windows (PSNR, SSIM), features (LPIPS where weights are
given; Frechet distances, of which only those in Inception's space are FID), codes (usage,
perplexity, bits per pixel), text that can still be read, and faces that are still the same. A
measure that lacks a package or weights keeps its row, which says what it needs.

    inputs.py       what is missing, told before torch is imported
    gallery.py      which pictures come in which batch; damaged ones are named
    instruments.py  the measures that can be made here, and why others cannot
    writing.py      pictures with text and what stands in them
    reading.py      text read off a reconstruction against what stood there
    faces.py        faces of an original, and the same places of a reconstruction
    records.py      what one rank finds, and how the ranks' findings join
    measure.py      one resolution: pictures through tokenizers into records
    summary.py      records into figures, and reasons for those that are missing
    rows.py         which figures there are, and what they may be compared with
    report.py       results.json, table.md and the printed table
    page.py         results.html with originals and reconstructions
    stage.py        the assembly

Batches are the same whatever the number of ranks, who take turns at them; what is found of each
picture is gathered, counts and sums are added. So one rank and several report the same figures.

Text and faces are measured with open models (rapidocr; a face network of the user's choice), and
the text mostly with generated pictures. These figures compare tokenizers measured in the same way
with one another; they do not compare with TokBench (arXiv 2505.18142), which has pictures, readers
and face networks of its own.
"""
