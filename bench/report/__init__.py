"""What a result file says: tables on a terminal, the READMEs' tables, pictures."""
