"""The peer a team would pick, Intel's Geti (its engine getitune), beside ours on the same splits.

    uv venv --python 3.11 ENV && uv pip install --python ENV/bin/python getitune==0.4.0
    python -m benchmarks.getitune --python ENV/bin/python --work FOLDER --ours pretrained=PROJECT

For the table of docs/comparison.md: `scratch=PROJECT` behind that, and `--size 128 --precision
bf16-mixed --epochs N`. ENV is outside the repository (6.7 GB); a PROJECT is the root of a tree in
which the stages up to `calibrate` have run on steel or solar; the first one's splits are taken.
"""
