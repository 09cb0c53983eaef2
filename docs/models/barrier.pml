/* The revocation barrier: no "good" to a request begun after the 200. protocols: Revocation barrier. Code: ca/barrier.go, ca/revoke.go, ocsp/feed.go,
   ocsp/lease.go, ocsp/responder.go.

   One revocation r, committed by CA 0; CA 1 handles a repeat of the request. Responder 0 serves; responder 1 joins (JOIN); with TWIN a second process
   takes over the name of responder 0 while the first one lives. Time is discrete, clocks have equal rates, L is the lease, M the margin.

   Rules that can be removed: -DCACHEDCLOCK -DLEASEFROMREPLY -DCHECKFIRST -DTABLEFIRST -DDUP200 -DJOIN with -DJOINEARLY, -DOUT with -DOUTSKIP or -DOUTKEEP,
   -DPROMISE with -DONEPROMISE, -DNEWCA with -DNOKNOW. -DTWIN with -DNOTWINWAIT. */
#ifndef L
#define L 2
#endif
#define M 1
#ifndef MAXT
#define MAXT 7
#endif
byte now=0; bool r=false; bool acked=false;
bool app[3]; byte lease[3];              /* responder: r applied; good until */
bool in1=false;                          /* responder 1 is registered */
bool out0=false; byte seen[2];           /* responder 0 has an "out" row; when each CA first saw it, plus one */
bool twin=false;                         /* the name of responder 0 has another process now */
bool dbcut=false;
#ifdef CACHEDCLOCK
byte cnow=0;
#define CLK cnow
#else
#define CLK now
#endif
proctype Clock() { do :: now<MAXT -> now++ :: else -> break od }
#ifdef CACHEDCLOCK
proctype Ticker() { do :: atomic { cnow<now -> cnow=now } :: now>=MAXT -> break od }
#endif

/* ocsp.follower */
proctype VA(byte v) { byte t0; bool saw; bool sawout;
  if :: v==1 ->                                        /* follower.register, then advance: only readings that begin later count */
#ifdef JOINEARLY
     saw=r; atomic { in1=true; app[1]=app[1]||saw; lease[1]=now+L; saw=false }
#else
     in1=true
#endif
     :: v==2 -> twin=true                              /* Join under a name that is taken: in(n+1) */
     :: else -> skip fi;
  do
  :: now>=MAXT -> break
  :: v==0 && twin -> atomic { lease[0]=0 }; break      /* checkMembership: superseded; only when it reads the row */
  :: !(v==0 && dbcut) && !(v==0 && twin) ->
     t0=now;                                           /* advance: the clock before the question */
     atomic { saw=r; sawout=(v==0 && out0) };          /* Head: a causal read */
     atomic { app[v]=app[v]||saw;                      /* apply, then lease.extend(asked) */
       if :: sawout ->
#ifdef OUTKEEP
             lease[v]=t0+L                             /* goes on without registering anew */
#else
             lease[v]=0; out0=false                    /* lease.end, register again; the next reading counts */
#endif
          :: !sawout ->
#ifdef LEASEFROMREPLY
             lease[v]=now+L
#else
             lease[v]=t0+L
#endif
       fi; t0=0; saw=false; sawout=false }
#ifdef PROMISE
  :: v==0 && dbcut -> t0=now;                          /* lease form (b), not in the code yet */
#if defined(ONEPROMISE) || defined(NEWCA)
     saw=false;                                        /* asks only CA nodes that know nothing of r */
#else
     saw=r;                                            /* asks every CA node: the one that committed says so */
#endif
     atomic { app[v]=app[v]||saw; lease[v]=t0+L; t0=0; saw=false }
#endif
  od }

/* responder.answerOne: beside the follower, in a goroutine of its own */
proctype Answer(byte v) { bool b; bool x;
  do
  :: now>=MAXT -> break
  :: b=acked;                                          /* the client sends its request, the responder reads it whole */
#ifdef CHECKFIRST
     atomic { b=false; (now<lease[v]) }; b=acked; atomic { assert(!(b && !app[v])); b=false }
#else
#ifdef TABLEFIRST
     x=app[v];
     atomic { if :: CLK<lease[v] && !x -> assert(!b) :: else -> skip fi; b=false; x=false }
#else
     x=(CLK<lease[v]);                                 /* choose: the lease, by the clock read now */
     atomic { if :: x && !app[v] -> assert(!b) :: else -> skip fi; b=false; x=false }   /* then the table */
#endif
#endif
  od }

proctype CA(byte k) { byte c; bool m1; bool o; bool tw; byte lapse0;
#ifdef DUP200
  if :: k==1 -> (r); acked=true; goto fin :: else -> skip fi;
#endif
  if :: k==0 -> r=true :: else -> (r) fi;              /* Revoker.record: committed and read back, by whomever */
  c=now;                                               /* Wait: the clock first */
  atomic { m1=in1; o=out0; tw=twin;                    /* register: the members, read after the commit */
    if :: o && seen[k]==0 -> seen[k]=now+1 :: else -> skip fi;
    lapse0=c+L+M;
#ifdef OUT
    if :: o && seen[k]-1+L+M<lapse0 -> lapse0=seen[k]-1+L+M :: else -> skip fi;
#ifdef OUTSKIP
    if :: o -> lapse0=0 :: else -> skip fi;
#endif
#endif
  };
  atomic { ( ( (app[0] && !tw) || now>=lapse0
#ifdef TWIN
     || (tw && app[2]                                  /* the name's newest process says applied */
#ifndef NOTWINWAIT
         && now>=c+L+M                                 /* and the older one's lease has run out */
#endif
        )
#endif
     )
#if defined(PROMISE) && defined(NEWCA) && !defined(NOKNOW)
     && (app[0] || !dbcut)                             /* may not count a responder lapsed that never confirmed this CA node */
#endif
     && (!m1 || app[1] || now>=c+L+M) ) || now>=MAXT;
  if :: now<MAXT -> acked=true :: else -> skip fi; c=0; m1=false; o=false; tw=false; lapse0=0 };
fin: skip }

#ifdef OUT
/* some earlier revocation's barrier found responder 0 lapsed and put it out */
proctype Putter() { if :: out0=true :: skip fi }
/* Barrier.Run: each CA looks at the members */
proctype Watch(byte k) {
endW: do
  :: atomic { out0 && seen[k]==0 -> seen[k]=now+1 }
  :: atomic { !out0 && seen[k]!=0 -> seen[k]=0 }
  od }
#endif

init { atomic {
#ifdef PROMISE
 if :: dbcut=true :: skip fi;
#endif
 run Clock();
#ifdef JOIN
 app[0]=true; run VA(1); run Answer(1);
#else
 lease[0]=L; run VA(0); run Answer(0);
#endif
#ifdef TWIN
 run VA(2);
#endif
 run CA(0);
#ifndef ONECA
 run CA(1);
#endif
#ifdef OUT
 run Putter(); run Watch(0);
#ifndef ONECA
 run Watch(1);
#endif

#endif
#ifdef CACHEDCLOCK
 run Ticker();
#endif
 } }
