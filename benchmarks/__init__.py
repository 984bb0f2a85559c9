"""Speed and memory as ratios against peers measured in the same run; rows in rows.jsonl, page in
docs/.
"""
