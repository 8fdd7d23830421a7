"""The style and the one small script of the run's page; embedded by page.py, fetched by nobody.

The five thin lines behind the title are a music staff; they carry the progress bar.
"""

STYLE = """
:root{--paper:#faf8f4;--card:#fff;--ink:#1d1b18;--soft:#6f6a61;--rule:#e4dfd5;--accent:#b4472e;
--s1:#2f6db3;--s2:#d9772b;--s3:#3c8c6a;--s4:#8a56a8;--s5:#b0374e;--s6:#6b7a2a;--s7:#2a8c9e;
--s8:#8c6d46;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#161513;--card:#1f1d1a;--ink:#ece7dd;
--soft:#a39c8f;--rule:#37332d;--accent:#ef8a6c;--s1:#7fb2ec;--s2:#f0a35f;--s3:#6cc49d;--s4:#c19ade;
--s5:#ec8296;--s6:#b3c46a;--s7:#6fcbd9;--s8:#cdae86}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:0 20px 40px;background:var(--paper);color:var(--ink);
font:16px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header{padding:44px 0 12px}
h1,h2{font-family:ui-serif,"Iowan Old Style",Palatino,Georgia,"DejaVu Serif",serif;font-weight:600;
letter-spacing:-.01em}
h1{margin:0;font-size:clamp(30px,6vw,46px);line-height:1.1}
h2{margin:0;font-size:27px}
h3{margin:0 0 12px;font-size:15px;font-weight:650}
p{margin:8px 0 0}
.subtitle{color:var(--soft);font-size:18px}
.state{display:flex;flex-wrap:wrap;gap:4px 18px;align-items:center;margin-top:20px;
font-variant-numeric:tabular-nums;color:var(--soft);font-size:15px}
.pill{color:var(--card);background:var(--soft);border-radius:99px;padding:1px 12px;font-weight:600;
font-size:14px}
.pill.running{background:var(--s1)}.pill.finished{background:var(--s3)}
.pill.stopped{background:var(--s2)}.pill.failed{background:var(--s5)}
.progress{position:relative;height:21px;margin-top:12px;background:repeating-linear-gradient(
var(--rule) 0 1px,transparent 1px 5px)}
.progress i{display:block;position:relative;height:21px;background:repeating-linear-gradient(
var(--accent) 0 1px,transparent 1px 5px)}
.progress i::after{content:"";position:absolute;right:-8px;top:6px;width:13px;height:9px;
border-radius:50%;background:var(--accent);transform:rotate(-18deg)}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;margin-top:16px}
nav a{color:var(--accent);text-decoration:none;font-size:15px}
nav a:hover{text-decoration:underline}
main{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px;align-items:start}
section{grid-column:1/-1;background:var(--card);border:1px solid var(--rule);border-radius:12px;
padding:18px 20px;min-width:0}
section.curve,section.bars{grid-column:span 1}
section.note{background:none;border:0;padding:0 2px;max-width:46em}
.chapter{grid-column:1/-1;margin-top:26px;padding-top:14px;border-top:3px double var(--rule)}
.chapter p{color:var(--soft);max-width:46em}
section>p,.empty{color:var(--soft);font-size:14px}
section.note>p{color:inherit;font-size:16px}
figure{margin:0}
figcaption{color:var(--soft);font-size:14px;font-variant-numeric:tabular-nums}
.grid{display:flex;flex-wrap:wrap;gap:0 26px;align-items:flex-start}
.grid h3{flex:0 0 100%}
.grid>figure{flex:0 1 auto;max-width:100%}
.grid>.history{flex:1 1 230px;min-width:0}
.grid .large{display:block;max-width:100%;height:auto;border-radius:6px}
.grid>figure>figcaption{margin-top:8px;min-height:1.5em}
.grid>figure>figcaption b{color:var(--ink);font-weight:600;margin-right:6px}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(92px,1fr));gap:12px}
.strip figure{cursor:pointer;border-radius:6px;outline-offset:2px}
.strip figure:focus-visible,.strip .on{outline:2px solid var(--accent)}
.strip img{display:block;width:100%;height:auto;border-radius:5px}
.strip figcaption{font-size:11px;line-height:1.3;margin-top:4px}
.play{margin-top:12px;font:inherit;font-size:14px;color:var(--accent);background:none;cursor:pointer;
border:1px solid var(--rule);border-radius:99px;padding:3px 16px}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(134px,1fr));gap:14px}
.row img{display:block;width:100%;height:auto;border-radius:5px}
.row figcaption{text-align:center;font-size:12px;margin-top:3px}
svg{display:block;width:100%;height:auto;overflow:visible}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px}
th{color:var(--soft);font-weight:550;font-size:13px;text-align:left}
th,td{padding:7px 18px 7px 0;border-bottom:1px solid var(--rule);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th:last-child,td:last-child{padding-right:0}
footer{margin-top:44px;color:var(--soft);font-size:13px}
@media(max-width:760px){body{padding:0 14px 30px}header{padding-top:28px}
section.curve,section.bars{grid-column:1/-1}section{padding:14px}
.grid .large{width:100%}
.strip{display:flex;overflow-x:auto;padding:3px 3px 8px}.strip figure{flex:0 0 92px}}
@media print{section{break-inside:avoid}.play{display:none}}
"""

SCRIPT = """
document.querySelectorAll('.strip').forEach(function(strip){
 var box=strip.closest('section'),large=box.querySelector('.large');
 var cap=box.querySelector('figcaption');
 var frames=Array.from(strip.children).map(function(f){return{node:f,
  src:f.querySelector('img').src,label:f.querySelector('figcaption').textContent,
  caption:f.dataset.caption}});
 frames.push({src:large.src,label:cap.children[0].textContent,
  caption:cap.children[1].textContent});
 function show(k){var f=frames[k];large.src=f.src;cap.children[0].textContent=f.label;
  cap.children[1].textContent=f.caption;
  frames.forEach(function(g){if(g.node)g.node.classList.toggle('on',g===f)})}
 frames.forEach(function(f,k){if(!f.node)return;var last=frames.length-1;
  f.node.onclick=function(){show(f.node.classList.contains('on')?last:k)};
  f.node.onkeydown=function(e){if(e.key==='Enter')f.node.onclick()}});
 box.querySelector('.play').onclick=function(){var k=0;var timer=setInterval(function(){
  show(k);k+=1;if(k===frames.length)clearInterval(timer)},450)};
});
"""
