"""Networks: any timm backbone behind one face, with the heads that objectives ask for."""
